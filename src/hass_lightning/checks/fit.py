"""Target and head against each other: weights that were really read, special tokens, vocabulary, rope.

Shapes: T positions, d head size (types.py has the legend).
"""

from __future__ import annotations

import torch
from safetensors import safe_open

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.draft import EagleDraft
from hass_lightning.target.model import TargetModel


def check_target_weights(target: TargetModel) -> Finding:
    """Every weight of the target stands in its files: transformers fills a missing one with random numbers."""
    stored: set[str] = set()
    for file in sorted(target.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    state = target.model.state_dict()
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    read = {places[name] for name in stored & set(places)}  # tied weights share a place
    missing = sorted(name for name, place in places.items() if place not in read)
    if len(missing) > len(state) / 2:
        return warning(
            "target_weights",
            f"the names in {target.folder} are not those of the model: they were not compared",
            "watch the warnings of transformers about newly initialised weights.",
        )
    if missing:
        message = f"{target.folder} lacks {missing[:4]}: transformers filled {len(missing)} weights with random numbers"
        return error("target_weights", message, "get the whole checkpoint, or correct tie_word_embeddings.")
    return ok("target_weights", f"all {len(state)} weights of {target.name} were read")


def check_special_tokens(target: TargetModel) -> Finding:
    """Answers can end, and every special token has an embedding."""
    size, tokenizer = target.head.vocab_size, target.tokenizer
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    if not target.eos_token_ids:
        return error(
            "special_tokens",
            "the target names no end-of-sequence token: no answer ends before its length limit",
            "set eos_token_id in generation_config.json of the target.",
        )
    outside = {name: token for name, token in ids.items() if token is not None and token >= size}
    outside |= {f"end {token}": token for token in target.eos_token_ids if token >= size}
    if outside:
        message = f"the embedding has {size} rows, but these tokens lie outside: {outside}"
        return error(
            "special_tokens", message, "the tokenizer is another model's, or its added tokens were never embedded."
        )
    own = {name: getattr(target.config, f"{name}_token_id", None) for name in ids}
    wrong = []
    for name in ("bos", "eos"):
        wanted, token = own[name], ids[name]
        if wanted is not None and token is not None and token not in (wanted if isinstance(wanted, list) else [wanted]):
            wrong.append(f"{name} is {token} for the tokenizer and {wanted} for the model")
    if wrong:
        cure = "correct config.json or tokenizer_config.json: engines read one or the other."
        return warning("special_tokens", "; ".join(wrong), cure)
    return ok("special_tokens", ", ".join(f"{name} {token}" for name, token in ids.items()))


def check_vocabulary(target: TargetModel, draft: EagleDraft, coverage: float | None) -> Finding:
    """The head's vocabulary is the target's, and a pruned one keeps what answers are made of."""
    head, model = draft.config.vocab_size, target.head.vocab_size
    if head != model or target.head.embed_tokens.shape[0] < model:
        message = f"the head's vocabulary has {head} tokens, the target's LM head {model}"
        return error("vocabulary", message, "build the head from this target's config.")
    if coverage is None:
        return ok("vocabulary", f"{model} tokens, all of them drafted")
    message = f"{draft.vocab_size} of {model} tokens are drafted: {100 * coverage:.2f} % of the training answers"
    if coverage < 0.95:
        return warning("vocabulary", message, "raise model.draft.vocab_size: a token outside is never accepted.")
    return ok("vocabulary", message)


@torch.no_grad()
def check_rope(target: TargetModel, draft: EagleDraft, longest: int) -> Finding:
    """The head rotates as the target does, at the start and at the longest position."""
    own = getattr(target.model.base_model, "rotary_emb", None)
    if own is None:
        cure = "compare acceptance at short and long prompts."
        return warning("rope", "the target has no rotary embedding of its own to compare with", cure)
    last = min(longest, target.max_length) - 1
    positions = torch.tensor([[0, 1, last // 2, last, target.max_length - 1]], device=target.device)
    ours = draft.rotary(positions)
    theirs = own(torch.zeros(1, 1, dtype=torch.float32, device=target.device), positions)
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))  # of [1, T, d] each
    if gap > 1e-3:
        message = (
            f"the head's rotary angles differ from the target's by up to {gap:.2g} at positions {positions[0].tolist()}"
        )
        cure = "copy rope_theta and rope_scaling (rope_parameters) from the target's config into the head's."
        return error("rope", message, cure)
    return ok("rope", f"the angles of head and target agree up to position {target.max_length - 1}")


def check_fc_bias(draft: EagleDraft) -> Finding:
    """Whether vLLM will serve the head."""
    if draft.fc.bias is None:
        return ok("fc_bias", "fc has no bias: every engine serves it")
    message = "fc has a bias, as in the official code: vLLM has no place for it (vllm#12831, #22323)"
    return warning("fc_bias", message, "set model.draft.fc_bias=false unless the head is for SGLang or the EAGLE code.")
