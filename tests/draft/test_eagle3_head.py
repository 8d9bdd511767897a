"""EAGLE-3's head and the alignment of both heads against an implementation of their own (shifted.py), in float64."""

import pytest
import torch
from shifted import logits, shifted
from transformers import LlamaConfig

from hass_lightning.draft import Alignment, Eagle3Draft, EagleDraft, unroll
from hass_lightning.draft.eagle3 import default_layers
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary

T, D, V, VD = 10, 32, 50, 20
CONFIG = LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
VOCABULARY = DraftVocabulary(torch.randn(V, D, generator=torch.Generator().manual_seed(3)).double())
EAGLE3 = {"eagle": False, "eagle3": True}


def make_draft(kind, attention="auto"):
    torch.manual_seed(0)
    if kind == "eagle":
        return EagleDraft.from_target(CONFIG, attention=attention).double()
    draft = Eagle3Draft.from_target(CONFIG, vocab_size=VD, attention=attention).double()
    for name, parameter in draft.named_parameters():
        if "norm" in name:  # weights of 1 would hide a norm in the wrong place
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return draft


def make_rows(kind, batch=1):
    generator = torch.Generator().manual_seed(1)
    width = (4 if kind == "eagle3" else 1) * D  # the target's features end with the last hidden state
    return (torch.randn(batch, T, size, generator=generator).double() for size in (D, width))


def own_part(kind, features):
    """What the head reads of the target's features [T, W]."""
    return features[:, : 3 * D] if kind == "eagle3" else features[:, -D:]


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("gradient", ["detach", "bptt"])
@pytest.mark.parametrize("kind", EAGLE3)
def test_aligned_steps_equal_the_shifted_ones_in_values_and_gradients(kind, gradient, attention):
    """Row t of HASS's step j is row t - j + 1 of EAGLE-3's training-time test; rows without a root are HASS's alone."""
    depth = 7
    draft, (embeddings, features) = make_draft(kind, attention), make_rows(kind)
    weights = {name: value.detach().clone().requires_grad_() for name, value in draft.named_parameters()}
    ours = [f[0, j:] for j, f in enumerate(unroll(draft, embeddings, features, Alignment(depth, gradient=gradient)))]
    theirs = shifted(
        weights, draft.config, embeddings[0], own_part(kind, features[0]), depth, gradient == "detach", EAGLE3[kind]
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=1e-10)
    if kind == "eagle3":
        ours = [draft.logits(f, VOCABULARY) for f in ours]
        theirs = [logits(weights, draft.config, f) for f in theirs]
        assert ours[0].shape == (T, VD)
    for outputs in (ours, theirs):
        sum(0.8**j * f.square().mean() for j, f in enumerate(outputs)).backward()
    for name, parameter in draft.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
        assert torch.allclose(parameter.grad, weights[name].grad, atol=1e-10, rtol=1e-8), name


@pytest.mark.parametrize("kind", EAGLE3)
@pytest.mark.parametrize("depth", range(1, 8))
def test_training_pass_equals_decode_path(kind, depth):
    """Target features up to the root, then single positions with the head's own: through the cache, as in decoding."""
    draft, (embeddings, features) = make_draft(kind), make_rows(kind)
    with torch.no_grad():
        final = list(unroll(draft, embeddings, features, Alignment(depth)))[-1]
        for row in range(depth - 1, T):
            cache, first = draft.new_cache(1, T), row - depth + 1
            own = draft(embeddings[:, : first + 1], features[:, : first + 1], cache)[:, -1:]
            cache.advance(first + 1)
            for position in range(first + 1, row + 1):
                own = draft(embeddings[:, position : position + 1], own, cache)
                cache.advance(1)
            assert torch.allclose(final[0, row], own[0, 0], atol=1e-10, rtol=0), row


@pytest.mark.parametrize("gradient", ["detach", "bptt"])
def test_skipped_positions_and_recomputation_do_not_change_the_gradient(gradient):
    embeddings, features = make_rows("eagle3", batch=3)
    rows = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.4
    whole, part = make_draft("eagle3"), make_draft("eagle3")
    for draft, wanted, checkpoint in ((whole, None, False), (part, rows, True)):
        alignment = Alignment(4, gradient=gradient, checkpoint=checkpoint)
        sum(f[rows].square().sum() for f in unroll(draft, embeddings, features, alignment, wanted)).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), part.named_parameters(), strict=True):
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-9), name


def test_the_decoding_layer_computes_the_same():
    draft, (embeddings, features) = make_draft("eagle3"), make_rows("eagle3")
    plain = draft(embeddings, features)
    draft.requires_grad_(False).join_layer()
    assert torch.allclose(draft(embeddings, features, draft.new_cache(1, T)), plain, atol=1e-6)


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(value.shape) for name, value in make_draft("eagle3").state_dict().items()}
    layer = {
        "self_attn.q_proj": (32, 2 * D), "self_attn.k_proj": (16, 2 * D), "self_attn.v_proj": (16, 2 * D),
        "self_attn.o_proj": (D, 32), "mlp.gate_proj": (48, D), "mlp.up_proj": (48, D), "mlp.down_proj": (D, 48),
        "hidden_norm": (D,), "input_layernorm": (D,), "post_attention_layernorm": (D,),
    }  # fmt: skip
    expected = {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    assert shapes == expected | {"fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (VD, D)}


def test_layers_are_those_of_the_engines_or_of_the_config():
    assert default_layers(30) == (2, 15, 27) and default_layers(32) == (2, 16, 29)
    assert default_layers(2) == (0, 1)
    assert make_draft("eagle3").feature_layers == (2, 4, 5)
    assert Eagle3Draft.from_target(CONFIG, feature_layers=[6]).fc.weight.shape == (D, D)
    for number, layers in {1: (5,), 2: (4, 5), 3: (2, 4, 5)}.items():
        assert Eagle3Draft.from_target(CONFIG, feature_layers=number).feature_layers == layers
    for wrong in ([], [3, 2], [2, 2], [8], [-1], 0, 4):
        with pytest.raises(ValueError, match=r"model\.draft\.feature_layers"):
            Eagle3Draft.from_target(CONFIG, feature_layers=wrong)


def test_a_borrowed_lm_head_follows_the_final_norm():
    draft, (embeddings, features) = Eagle3Draft.from_target(CONFIG, lm_head="target").double(), make_rows("eagle3")
    own = draft(embeddings, features)
    assert torch.equal(draft.logits(own, VOCABULARY), VOCABULARY.logits(draft.norm(own)))
    assert torch.equal(draft.output(own), draft.norm(own))
    assert [parameter is draft.norm.weight for parameter in draft.logit_parameters()] == [True]
    with pytest.raises(ValueError, match=r"model\.draft\.lm_head=mine"):
        Eagle3Draft.from_target(CONFIG, lm_head="mine")
