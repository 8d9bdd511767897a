"""Export checks: the comparisons that an exported folder must pass before it is kept (docs/serving.md).

Engines load a wrong file silently: a missing tensor keeps its random value, an unknown one is dropped, a config key has
another meaning. Therefore names, shapes, dtypes, values, config, logits and draft tokens are compared.
Shapes: T tokens, D hidden, V vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.draft import DraftHead, SavedDraft
from hass_lightning.draft.checkpoint import check_tensors, tensor_hash
from hass_lightning.draft.head_config import rope_fields
from hass_lightning.serving.engines import Profile
from hass_lightning.serving.kinds import layout_of
from hass_lightning.serving.layout import bias_fields
from hass_lightning.serving.reference import ReferenceHead, rope_readings, rotary_frequencies
from hass_lightning.target_model import DraftVocabulary, TargetHead, TargetModel

TOLERANCE = 1e-4  # maximum logit difference relative to the largest logit, both in float32
CHAIN_DEPTH = 5
MAPS = ("d2t", "t2d")  # the draft vocabulary of EAGLE-3
TEXT = "Speculative decoding drafts several tokens with a small head and verifies them in one pass of the large model. "


def check_export(
    folder: Path,
    saved: SavedDraft,
    target: TargetModel,
    profile: Profile,
    dtype: torch.dtype,
    initial: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Check an exported folder against its head.

    Args:
        folder: the export.
        saved: the head.
        target: the target.
        profile: the layout.
        dtype: dtype of the file.
        initial: hashes of the head's tensors before training, by name (None: unknown, as for an imported head).

    Returns:
        The measured values: max_relative_difference of the logits, chain_depth, num_tokens.

    Raises:
        ValueError: if a tensor or config key is wrong; all of them are named.
    """
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    fc_bias, layout = saved.draft.fc_bias is not None, layout_of(saved.draft)
    check_tensors(f"the export in {folder}", layout.shapes(saved, profile), tensors)
    problems = layout.problems(saved, tensors, config)
    problems += value_problems(tensors, saved.draft, target.head, dtype)
    problems += untrained(saved.draft, initial or {})
    problems += config_problems(config, saved.draft, target.config, profile, fc_bias)
    problems += rope_problems(config, saved.draft)
    if problems:
        raise ValueError(f"the export in {folder} is refused: {'; '.join(problems)}.")
    if layout.reference is None:
        return {}
    return parity(layout.reference(folder), saved.draft, target, dtype, layout.token_ids(saved))


def value_problems(tensors: dict[str, Tensor], draft: DraftHead, head: TargetHead, dtype: torch.dtype) -> list[str]:
    """List tensors of the file that are not finite, constant, of the wrong dtype or different from the head's."""
    own = draft.state_dict() | {"embed_tokens.weight": head.embed_tokens}
    problems = []
    for name, tensor in tensors.items():
        if name in MAPS:
            continue  # checked with the layout
        expected = own[name].cpu().to(dtype) if name in own else torch.zeros_like(tensor)  # a bias that is none
        if tensor.dtype != dtype:
            problems.append(f"{name} is {tensor.dtype} instead of {dtype}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} is not finite in {dtype} (an overflow? try dtype=bfloat16)")
        elif tensor.ndim > 1 and tensor.min() == tensor.max():
            problems.append(f"{name} is constant")
        elif not torch.equal(tensor, expected):
            problems.append(f"{name} differs from the trained head")
    return problems


def untrained(draft: DraftHead, initial: dict[str, str]) -> list[str]:
    """List tensors that still have their values from before training."""
    same = [name for name, value in draft.state_dict().items() if initial.get(name) == tensor_hash(value)]
    return [f"{name} still has its initial value: training never changed it" for name in same]


def config_problems(
    config: dict[str, Any], draft: DraftHead, target_config: Any, profile: Profile, fc_bias: bool
) -> list[str]:
    """List keys of config.json that an engine would misinterpret."""
    head = draft.config
    expected: dict[str, Any] = {
        "architectures": [profile.architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": target_config.max_position_embeddings,
        "vocab_size": target_config.vocab_size,
        **bias_fields(head, profile),
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **rope_fields(head),
    }
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    expected |= {name: getattr(head, name) for name in (*sizes, "rms_norm_eps")}
    problems = [
        f"config.json has {name}={config.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if name not in config or config[name] != value
    ]
    if profile.bias_key and config.get("bias") is not fc_bias:
        problems.append(f"config.json has bias={config.get('bias')!r}, but for this file it must be {fc_bias}")
    if not profile.bias_key and "bias" in config:
        problems.append(
            f"config.json has bias={config['bias']!r}: {profile.name} would read it as biases of q, k, v and o, which "
            "are not in the file"
        )
    return problems


def rope_problems(config: dict[str, Any], draft: DraftHead) -> list[str]:
    """List the keys from which an engine would compute other rotary angles than those of the training."""
    own = draft.rotary.frequencies()
    problems = []
    for spelling, rope in rope_readings(config).items():
        try:
            found = rotary_frequencies(rope, draft.layer.self_attn.head_dim)
        except ValueError as error:
            problems.append(f"in {spelling} {error}")
            continue
        same = torch.allclose(found[0].float(), own[0], rtol=1e-4, atol=0) and abs(found[1] - own[1]) < 1e-4
        if not same:
            problems.append(f"{spelling} give other rotary angles than those of the training ({rope})")
    return problems


@torch.inference_mode()
def parity(
    reference: ReferenceHead,
    draft: DraftHead,
    target: TargetModel,
    dtype: torch.dtype,
    drafted_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Compare logits on target features, and greedy chains, with the reference implementation, both in float32.

    Args:
        reference: reads the exported files.
        draft: the trained head.
        target: the target.
        dtype: dtype of the file.
        drafted_ids: [Vd], the draft vocabulary that the exported head has (None: full).

    Raises:
        ValueError: if they differ.
    """
    token_ids = target.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:64]
    ids = torch.tensor([token_ids])
    head = target.head.to("cpu", torch.float32)
    features = target.reading(draft.feature_layers).encode(ids).float().cpu()
    vocabulary = head.draft_vocabulary(drafted_ids)
    embeddings = head.embed(ids)
    ours = deepcopy(draft).to("cpu", dtype).float().eval()  # rounded like the file, computed in float32
    expected = ours.logits(ours(embeddings[:, 1:], features[:, :-1])[0], vocabulary)
    found = reference.logits(head, reference.features(embeddings[0, 1:], reference.read(features[0, :-1])))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported head computes other logits than the trained one (relative difference {difference:.1e}): the "
            "exported files do not match the trained head."
        )
    for end in range(len(token_ids) // 4, len(token_ids), len(token_ids) // 4):
        start = (token_ids[: end + 1], features[0, :end])
        chains = greedy_chain(ours, head, vocabulary, *start), reference.chain(head, *start, CHAIN_DEPTH)
        if chains[0] != chains[1]:
            raise ValueError(f"the exported head drafts {chains[1]} after token {end} instead of {chains[0]}.")
    return {"max_relative_difference": difference, "chain_depth": CHAIN_DEPTH, "num_tokens": len(token_ids)}


def greedy_chain(
    draft: DraftHead, head: TargetHead, vocabulary: DraftVocabulary, token_ids: list[int], features: Tensor
) -> list[int]:
    """Draft tokens after `token_ids` [T+1], whose first T tokens have `features` [T, W], computed as in decoding."""
    cache = draft.new_cache(1, len(token_ids) + CHAIN_DEPTH)
    own = draft(head.embed(torch.tensor([token_ids[1:]])), features[None], cache)[:, -1:]
    cache.advance(len(token_ids) - 1)
    drafted: list[int] = []
    while True:
        drafted.append(int(vocabulary.to_token_ids(draft.logits(own, vocabulary)[0, 0].argmax())))
        if len(drafted) == CHAIN_DEPTH:
            return drafted
        own = draft(head.embed(torch.tensor([drafted[-1:]])), own, cache)
        cache.advance(1)
