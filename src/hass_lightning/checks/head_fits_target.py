"""Checks that target and head fit: stored weights, special tokens, vocabulary, rotary embedding.

Shapes: T positions, d head size (see the legend in types.py).
"""

from __future__ import annotations

import json

import torch

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.draft import DraftHead, draft_config
from hass_lightning.draft.layers import RotaryAngles
from hass_lightning.draft.rope import head_rope
from hass_lightning.target_model.model import TargetModel
from hass_lightning.target_model.requirements import target_rope
from hass_lightning.target_model.weights import check_stored


def check_target_weights(target: TargetModel) -> Finding:
    """Check that every weight of the target is in its files, as transformers reports (it follows renamed tensors)."""
    config = target.folder / "config.json"
    stored = json.loads(config.read_text()).get("num_hidden_layers") if config.exists() else None
    first_layers = stored not in (None, target.model.config.num_hidden_layers)
    try:
        check_stored(target.folder, target.model, first_layers)
    except ValueError as problem:
        return error("target_weights", str(problem))
    return ok("target_weights", f"all {len(target.model.state_dict())} weights of {target.name} are in its files")


def check_special_tokens(target: TargetModel) -> Finding:
    """Check that answers can end, and that every special token has an embedding."""
    size, tokenizer = target.head.vocab_size, target.tokenizer
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    if not target.eos_token_ids:
        return error(
            "special_tokens",
            "the target has no end-of-sequence token: answers end only at the length limit",
            "set eos_token_id in generation_config.json of the target.",
        )
    outside = {name: token for name, token in ids.items() if token is not None and token >= size}
    outside |= {f"end {token}": token for token in target.eos_token_ids if token >= size}
    if outside:
        message = f"the embedding has {size} rows, but these tokens have larger ids: {outside}"
        return error(
            "special_tokens", message, "the tokenizer belongs to another model, or its added tokens have no embedding."
        )
    own = {name: getattr(target.config, f"{name}_token_id", None) for name in ids}
    wrong = []
    for name in ("bos", "eos"):
        wanted, token = own[name], ids[name]
        if wanted is not None and token is not None and token not in (wanted if isinstance(wanted, list) else [wanted]):
            wrong.append(f"{name} is {token} for the tokenizer and {wanted} for the model")
    if wrong:
        cure = "correct config.json or tokenizer_config.json: engines read either of them."
        return warning("special_tokens", "; ".join(wrong), cure)
    return ok("special_tokens", ", ".join(f"{name} {token}" for name, token in ids.items()))


def check_vocabulary(target: TargetModel, draft: DraftHead, coverage: float | None) -> Finding:
    """Check that the head's vocabulary is the target's, and that a pruned one covers the answers."""
    head, model = draft.config.vocab_size, target.head.vocab_size
    if head != model or target.head.embed_tokens.shape[0] < model:
        message = f"the head's vocabulary has {head} tokens, the target's LM head {model}"
        return error("vocabulary", message, "build the head from this target's config.")
    if coverage is None:
        return ok("vocabulary", f"all {model} tokens can be drafted")
    message = f"{draft.vocab_size} of {model} tokens can be drafted: {100 * coverage:.2f} % of the training answers"
    if coverage < 0.95:
        return warning(
            "vocabulary", message, "increase model.draft.vocab_size: a token that is not in it is never accepted."
        )
    return ok("vocabulary", message)


@torch.no_grad()
def check_rope(target: TargetModel, draft: DraftHead, longest: int) -> Finding:
    """Check that the head's rotary angles are those of a head for this target, and the target's if the rope is the
    same.
    """
    last = min(longest, target.max_length) - 1
    positions = torch.tensor([[0, 1, last // 2, last, target.max_length - 1]], device=target.device)
    ours = draft.rotary(positions)
    wanted = head_rope(target.config)
    others = {"those of a head for this target": RotaryAngles(draft_config(target.config))(positions)}
    rope, module = target_rope(target.config), getattr(target.model.base_model, "rotary_emb", None)
    same = {"partial_rotary_factor": 1.0} | rope == {"partial_rotary_factor": 1.0} | wanted
    if same and module is not None and rope == target.config.rope_parameters:
        like = torch.zeros(1, 1, dtype=torch.float32, device=target.device)
        others["the target's"] = module(like, positions)
    for whose, theirs in others.items():
        gap = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))  # of [1, T, d] each
        if gap > 1e-3:
            message = (
                f"the head's rotary angles differ from {whose} by up to {gap:.2g} at positions {positions[0].tolist()}"
            )
            cure = "copy rope_theta and rope_scaling (rope_parameters) from the target's config into the head's."
            return error("rope", message, cure)
    if not same:
        kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
        message = (
            f"the head rotates all dimensions (rope_type={wanted['rope_type']}, rope_theta={rope['rope_theta']:g}), "
            f"as every engine reads it; the target's own rope is {kind}, with partial factor {part:g}"
        )
        return ok("rope", message)
    return ok("rope", f"the angles of head and target agree up to position {target.max_length - 1}")


def check_fc_bias(draft: DraftHead) -> Finding:
    """Check whether vLLM can serve the head."""
    if draft.fc_bias is None:
        return ok("fc_bias", "fc has no bias: every engine can serve it")
    message = "fc has a bias, as in the official code, which vLLM does not support (vllm#12831, #22323)"
    return warning("fc_bias", message, "set model.draft.fc_bias=false unless the head is for SGLang or the EAGLE code.")
