"""Speculative decoding inside transformers' `generate`, through its argument `custom_generate`.

    model.generate(**inputs, max_new_tokens=128, custom_generate=hass_lightning.speculative("runs/quickstart"))

transformers prepares the input, the logits processors and the stopping criteria, and calls the decoding loop of this
module in place of its own. Processors and criteria are called as in transformers' loop: once per new token, in order,
with all tokens before it. Stateful processors therefore work, sampling uses the same random numbers, and in float32 the
output equals that of `generate` without a head.
Shapes: T tokens of the prompt, V vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hass_lightning.decoding import DecodingModels, DynamicTree
from hass_lightning.draft import SavedDraft, load_draft
from hass_lightning.target_model import TargetModel
from hass_lightning.types import DecodeResult

# Arguments of the model's forward that `generate` adds itself and that the decoding loop computes again.
PREPARED = ("attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache")
MODES = ("greedy_search", "sample")


def speculative(head: str | Path | SavedDraft, decoder: Any = None) -> Speculative:
    """Return a decoding loop for `model.generate(…, custom_generate=…)` of an ordinary transformers model.

    Args:
        head: a head that was trained for the model: a run folder, a head folder or the result of `load_draft`.
        decoder: a decoder of `hass_lightning.decoding` that drafts with a head (None: `DynamicTree()`).

    Raises:
        ValueError: if `head` contains no draft head. The returned loop raises it if the head does not fit the model,
            or if an argument of the call is not supported; the message names the argument.
    """
    return Speculative(head, decoder)


class Speculative:
    """The decoding loop that `speculative` returns. It can be used for several calls.

    Attributes:
        result: the last answer with its trace; `result.acceptance_length` is its number of tokens per target forward.
    """

    def __init__(self, head: str | Path | SavedDraft, decoder: Any = None):
        self.label = "" if isinstance(head, SavedDraft) else str(head)
        self.saved = head if isinstance(head, SavedDraft) else load_draft(head)
        self.decoder = decoder if decoder is not None else DynamicTree()
        self.result: DecodeResult | None = None
        self._models: DecodingModels | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool | None = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode one answer. Called by `generate` with the arguments that it prepared.

        Args:
            input_ids: the prompt [1, T].

        Returns:
            The prompt and the answer [1, T + new], or a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.
        """
        streamer = streamer if streamer is not None else _argument_of_generate("streamer")
        refuse_unsupported(input_ids, generation_config, model_kwargs, bool(synced_gpus))
        models = self._models_for(model)
        prompt = input_ids[0].tolist()
        limit = generation_config.max_length - len(prompt)
        if generation_config.max_length > models.target.max_length:
            raise ValueError(
                f"max_new_tokens={limit} after a prompt of {len(prompt)} tokens exceeds the maximum length of "
                f"{models.target.name} ({models.target.max_length} tokens): lower max_new_tokens."
            )
        chooser = _Chooser(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        for result in self.decoder.stream(models, prompt, limit, selector=chooser):
            self.result = result
        if streamer is not None:
            streamer.end()
        return chooser.output()

    def _models_for(self, model: Any) -> DecodingModels:
        """Return the head in the model's dtype and on its device. It is cached until the model's weights move."""
        weight, known = model.get_output_embeddings().weight, self._models
        same = known is not None and known.target.model is model
        if known is None or not same or known.target.head.lm_head.data_ptr() != weight.data_ptr():
            target = TargetModel.around(model)
            self.saved.check_sizes(self.label, target)
            self._models = known = DecodingModels.of(target, self.saved)
        return known


class _Chooser:
    """Selects each token as transformers' `_sample` does: processors, argmax or sampling, streamer, criteria."""

    def __init__(self, input_ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any):
        self.ids, self.processors, self.criteria = input_ids, processors, criteria
        self.config, self.streamer = config, streamer
        in_dict = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if in_dict and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if in_dict and config.output_logits else None

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        """Return the next token, given the model's logits [V], and whether it is the last one."""
        with torch.inference_mode(False), torch.no_grad():
            raw = logits[None].to(self.ids.device, torch.float32, copy=True)  # [1, V]
            scores = self.processors(self.ids, raw)
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (raw,)
            if self.config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                token = scores.argmax(-1)
            self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            return int(token), bool(self.criteria(self.ids, self.scores).any())

    def output(self) -> Any:
        """The result of `generate`."""
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        fields: dict[str, Any] = {"sequences": self.ids, "scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(**fields)


def refuse_unsupported(input_ids: Tensor, config: Any, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
    """Check that the call uses no feature of `generate` that this loop does not support.

    Raises:
        ValueError: if it does; the message names the argument.
    """
    assistant = _argument_of_generate("assistant_model")
    if (mode := config.get_generation_mode(assistant)) not in MODES:
        raise ValueError(
            f"this call requests {str(getattr(mode, 'value', mode)).replace('_', ' ')} (num_beams, assistant_model, "
            "prompt_lookup_num_tokens, penalty_alpha or dola_layers), but a draft head supports only greedy decoding "
            "and sampling: remove that argument."
        )
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"the batch has {input_ids.shape[0]} sequences (several prompts, or num_return_sequences), but a draft "
            "head decodes one at a time: call generate once per sequence."
        )
    if synced_gpus or _argument_of_generate("synced_gpus"):
        raise ValueError("synced_gpus=True (FSDP or DeepSpeed ZeRO-3) is not supported: gather the parameters first.")
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name}=True is not supported: a draft tree has no outputs of a single sequence.")
    if unknown := sorted(name for name, value in model_kwargs.items() if name not in PREPARED and value is not None):
        raise ValueError(f"{', '.join(unknown)} cannot be passed to the model when a draft head decodes: remove it.")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("attention_mask hides tokens of the prompt (padding?): remove these tokens from the prompt.")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.flatten().tolist() != list(range(input_ids.shape[1])):
        raise ValueError("position_ids other than 0, 1, 2, … are not supported: remove position_ids.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values already contains tokens, but the draft head needs the features of all "
                         "tokens: remove it.")  # fmt: skip


def _argument_of_generate(name: str) -> Any:
    """Return an argument of the calling `generate`, or None if it was not given.

    transformers does not pass `streamer`, `synced_gpus` and `assistant_model` to a callable `custom_generate`: in 5.23,
    `_extract_generation_mode_kwargs` replaces them with the arguments that only the callable has.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_locals.get(name)
    return None
