"""What an exported folder must pass before it is left behind (serving_formats.md §2.7).

Engines load a wrong file without a word: an absent tensor keeps a random value, an unknown one is dropped, a config key
means something else. So names, shapes, dtype, values, config, logits and drafts are compared here, and what differs is
named. Shapes: T tokens, D hidden, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hass_lightning.draft import EagleDraft, SavedDraft
from hass_lightning.draft.checkpoint import check_tensors, rope_fields, tensor_hash
from hass_lightning.serving.layout import shapes_for
from hass_lightning.serving.profiles import Profile
from hass_lightning.serving.reference import ReferenceHead
from hass_lightning.target import TargetHead, TargetModel

TOLERANCE = 1e-4  # of the greatest logit, both sides in float32
CHAIN_DEPTH = 5
TEXT = "Speculative decoding drafts several tokens with a small head and verifies them in one pass of the large model. "


def check_export(
    folder: Path,
    saved: SavedDraft,
    target: TargetModel,
    profile: Profile,
    dtype: torch.dtype,
    initial: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Check a written folder against the head it was made from.

    Args:
        initial: hashes of the head's tensors before training, by name (None: not known, an imported head).

    Returns:
        what was measured: max_relative_difference of the logits, chain_depth, num_tokens.

    Raises:
        ValueError: naming every tensor or key that is wrong.
    """
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    fc_bias = saved.draft.fc.bias is not None
    check_tensors(f"the export in {folder}", shapes_for(saved.draft.config, profile, fc_bias), tensors)
    problems = value_problems(tensors, saved.draft, target.head, dtype)
    problems += untrained(saved.draft, initial or {})
    problems += config_problems(config, saved.draft, target.config, profile, fc_bias)
    if problems:
        raise ValueError(f"the export in {folder} is refused: {'; '.join(problems)}.")
    return parity(ReferenceHead(folder), saved.draft, target, dtype)


def value_problems(tensors: dict[str, Tensor], draft: EagleDraft, head: TargetHead, dtype: torch.dtype) -> list[str]:
    """Tensors of the file that are not finite, constant, of another dtype, or not those of the head."""
    own = draft.state_dict() | {"embed_tokens.weight": head.embed_tokens}
    problems = []
    for name, tensor in tensors.items():
        expected = own[name].cpu().to(dtype) if name in own else torch.zeros_like(tensor)  # fc.bias that is none
        if tensor.dtype != dtype:
            problems.append(f"{name} is {tensor.dtype} instead of {dtype}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} is not finite in {dtype} (an overflow? try dtype=bfloat16)")
        elif tensor.ndim > 1 and tensor.min() == tensor.max():
            problems.append(f"{name} is constant")
        elif not torch.equal(tensor, expected):
            problems.append(f"{name} differs from the trained head")
    return problems


def untrained(draft: EagleDraft, initial: dict[str, str]) -> list[str]:
    """Tensors that still are what they were before training."""
    same = [name for name, value in draft.state_dict().items() if initial.get(name) == tensor_hash(value)]
    return [f"{name} still has its initial value: training never changed it" for name in same]


def config_problems(
    config: dict[str, Any], draft: EagleDraft, target_config: Any, profile: Profile, fc_bias: bool
) -> list[str]:
    """Keys of config.json that an engine would misread."""
    head = draft.config
    expected: dict[str, Any] = {
        "architectures": [profile.architecture],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": target_config.max_position_embeddings,
        "vocab_size": target_config.vocab_size,
        "attention_bias": False,
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
        problems.append(f"config.json has bias={config.get('bias')!r}, but the file's fc.bias says {fc_bias}")
    if not profile.bias_key and "bias" in config:
        problems.append(
            f"config.json has bias={config['bias']!r}: {profile.name} would read it as biases of q, k, v and o, which "
            "are not in the file"
        )
    return problems


@torch.inference_mode()
def parity(reference: ReferenceHead, draft: EagleDraft, target: TargetModel, dtype: torch.dtype) -> dict[str, Any]:
    """Compare logits on the target's features, and greedy chains, with the second implementation, both in float32.

    Raises:
        ValueError: they differ.
    """
    token_ids = target.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:64]
    ids = torch.tensor([token_ids])
    head = target.head.to("cpu", torch.float32)
    features = target.encode(ids).float().cpu()
    embeddings = head.embed(ids)
    ours = deepcopy(draft).to("cpu", dtype).float().eval()  # rounded as the file is, computed in float32
    expected = head.logits(ours(embeddings[:, 1:], features[:, :-1])[0])
    found = head.logits(reference.features(embeddings[0, 1:], features[0, :-1]))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported head computes other logits than the trained one (relative difference {difference:.1e}): the "
            "files and the network do not agree."
        )
    for end in range(len(token_ids) // 4, len(token_ids), len(token_ids) // 4):
        start = (token_ids[: end + 1], features[0, :end])
        chains = greedy_chain(ours, head, *start), reference.chain(head, *start, CHAIN_DEPTH)
        if chains[0] != chains[1]:
            raise ValueError(f"the exported head drafts {chains[1]} after token {end} instead of {chains[0]}.")
    return {"max_relative_difference": difference, "chain_depth": CHAIN_DEPTH, "num_tokens": len(token_ids)}


def greedy_chain(draft: EagleDraft, head: TargetHead, token_ids: list[int], features: Tensor) -> list[int]:
    """What the head drafts after `token_ids` [T+1] with `features` [T, D] of the first T, as decoding does it."""
    cache = draft.new_cache(1, len(token_ids) + CHAIN_DEPTH)
    own = draft(head.embed(torch.tensor([token_ids[1:]])), features[None], cache)[:, -1:]
    cache.advance(len(token_ids) - 1)
    drafted: list[int] = []
    while True:
        drafted.append(int(head.logits(own)[0, 0].argmax()))
        if len(drafted) == CHAIN_DEPTH:
            return drafted
        own = draft(head.embed(torch.tensor([drafted[-1:]])), own, cache)
        cache.advance(1)
