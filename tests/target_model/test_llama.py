"""The decoding layers equal transformers, for one token, several tokens, trees and ragged batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree
from hass_lightning.draft import EagleDraft, draft_config
from hass_lightning.target_model import TargetModel
from hass_lightning.target_model.llama import LlamaStep

SIZES = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05}  # the norm is fp32 in each of them


class Tokenizer:
    eos_token_id, all_special_ids = None, ()


def make(heads=4, groups=2, head_dim=8, dtype=torch.float32, kind="llama", **more):
    torch.manual_seed(0)
    sizes = SIZES | {"num_attention_heads": heads, "num_key_value_heads": groups, "bos_token_id": None} | more
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(head_dim=head_dim, eos_token_id=None, **sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(eos_token_id=None, **sizes))
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0) + ("norm" in name)
    return TargetModel(model.to(dtype), Tokenizer(), "toy", ".")


def both(target, ids, length=0, positions=None, mask=None, batch=1, slots=None):
    """Return features and cache contents of ours and of transformers, with the same `length` cached tokens."""
    found = []
    for step in (target._step, target._transformers_step):
        cache = target.new_cache(batch, 16)
        if length:
            target._transformers_step(torch.arange(length).repeat(batch, 1), cache, torch.arange(length)[None], None)
            cache.advance(length)
        if slots is not None:
            cache.slots, cache.read_length = slots, int(slots.max()) + 1
        where = torch.arange(length, length + ids.shape[1])[None] if positions is None else positions
        found.append((torch.cat(step(ids, cache, where, mask, (0, 1)), -1), cache.storage))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(4, 4, 8), (8, 2, 4), (2, 1, 24)])
@torch.inference_mode()
def test_matches_transformers(heads, groups, head_dim, dtype):
    target = make(heads, groups, head_dim, dtype)
    assert isinstance(target._step, LlamaStep)
    ids = torch.tensor([[7, 30, 9, 4, 4]])
    tree = torch.ones(1, 1, 5, 11, dtype=torch.bool)
    ancestors = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    tree[0, 0, :, 6:] = torch.tensor(ancestors)
    ragged = torch.arange(6)[None, None, None] <= torch.tensor([2, 5, 4])[:, None, None, None]
    depths = torch.tensor([[6, 7, 7, 8, 8]])
    rows = torch.tensor([[2], [5], [4]])
    cases = [
        both(target, ids),  # a prefill
        both(target, ids[:, :1], length=6),
        both(target, ids, length=6),  # several tokens in a row
        both(target, ids, length=6, positions=depths, mask=tree),
        both(target, ids[0, :3, None], length=6, positions=rows, mask=ragged, batch=3, slots=rows),
    ]
    for ours, theirs in cases:
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_weights_are_joined_without_copies():
    target = make()
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    again = TargetModel(target.model, Tokenizer(), "toy", ".")
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, before[name])
    layer, module = again._step.layers[1], again.model.model.layers[1]
    parts = [module.self_attn.q_proj, module.self_attn.k_proj, module.self_attn.v_proj]
    assert torch.equal(layer.qkv.plain, torch.cat([part.weight for part in parts]))
    assert all(
        part.weight.untyped_storage().data_ptr() == layer.qkv.plain.untyped_storage().data_ptr() for part in parts
    )


@pytest.mark.parametrize("change", ["class", "bias", "layer", "attention"])
def test_other_models_use_transformers(change):
    more = {"kind": "qwen2"} if change == "class" else {"attention_bias": True} if change == "bias" else {}
    model = make(**more).model
    if change == "layer":
        model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    if change == "attention":
        model.config._attn_implementation = "flex_attention"
    assert not LlamaStep.fits(model)


def test_a_target_of_another_family_decodes_losslessly():
    target = make(kind="qwen2", dtype=torch.float64)
    assert target._step == target._transformers_step
    models = DecodingModels(target, EagleDraft(draft_config(target.config)).double().eval())
    text = Autoregressive().generate(models, [3, 1, 4], 20).token_ids
    assert len(set(text)) > 3
    assert DynamicTree(6, 3, 2).generate(models, [3, 1, 4], 20).token_ids == text
    whole = torch.tensor([[3, 1, 4, *text]])
    assert target.model(whole).logits[0, 2:-1].argmax(-1).tolist() == text


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_joined_layer_of_a_head_matches_its_own(dtype):
    draft = EagleDraft(draft_config(make(heads=8, groups=2).config)).to(dtype).eval().requires_grad_(False)
    embeddings, features = torch.randn(2, 1, 7, 32).to(dtype).unbind()
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool)
    mask[..., 5:] = torch.tensor([[0, 0], [1, 0], [0, 1]])

    def run():
        cache = draft.new_cache(1, 16)
        parts = []
        for start, end, allowed in ((0, 3, None), (3, 4, None), (4, 7, mask)):
            positions = torch.tensor([[start, start + 1, start + 1]])[:, : end - start]
            inputs = embeddings[:, start:end], features[:, start:end]
            parts.append(draft(*inputs, cache, positions if allowed is not None else None, allowed))
            cache.advance(end - start)
        return torch.cat(parts, dim=1)

    expected = run()
    draft.join_layer()
    torch.testing.assert_close(run(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
