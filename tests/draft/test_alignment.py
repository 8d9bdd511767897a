"""HCA: the parallel training pass equals sequential decoding, for every depth and position (docs/method.md, HCA)."""

import pytest
import torch
from transformers import LlamaConfig

from hass_lightning.draft import Alignment, EagleDraft, unroll
from hass_lightning.draft.attention import visible

T, D = 9, 32


def make_draft(seed=0, fc_bias=False) -> EagleDraft:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return EagleDraft(config, fc_bias=fc_bias).double()


def make_rows(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, T, D)
    return torch.randn(shape, generator=generator).double(), torch.randn(shape, generator=generator).double()


def decode_path(draft, embeddings, features, row, depth):
    """Decode with target features up to row-(depth-1), then depth-1 single positions with predicted features."""
    cache = draft.new_cache(1, T)
    first = row - (depth - 1)
    output = draft(embeddings[:, : first + 1], features[:, : first + 1], cache)
    cache.advance(first + 1)
    own = output[:, -1:]
    for position in range(first + 1, row + 1):
        own = draft(embeddings[:, position : position + 1], own, cache)
        cache.advance(1)
    return own[0, 0]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_training_pass_equals_decode_path(depth):
    draft = make_draft()
    embeddings, features = make_rows(1)
    with torch.no_grad():
        final = list(unroll(draft, embeddings, features, Alignment(depth)))[-1]
        for row in range(depth - 1, T):
            expected = decode_path(draft, embeddings, features, row, depth)
            assert torch.allclose(final[0, row], expected, atol=1e-10, rtol=0), (depth, row)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_position_attends_to_each_earlier_position_once(depth):
    seen = sum(visible(T, depth, band).int() for band in range(depth))
    expected = torch.ones(T, T).tril().int()
    assert torch.equal(seen, expected)


def test_depth_one_equals_ordinary_attention():
    draft = make_draft()
    embeddings, features = make_rows()
    (only,) = unroll(draft, embeddings, features, Alignment(1))
    assert torch.allclose(only, draft(embeddings, features), atol=1e-12)


def test_one_backward_equals_one_backward_per_step():
    """The official code projects all bands again in each step and runs one backward per step (docs/method.md, HCA)."""
    embeddings, features = make_rows()
    ours, official = make_draft(), make_draft()
    sum(f.square().mean() for f in unroll(ours, embeddings, features, Alignment(4))).backward()
    for step in range(1, 5):
        (list(unroll(official, embeddings, features, Alignment(step)))[-1]).square().mean().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), official.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), name


def test_steps_are_detached():
    """The second step's loss reaches the first band only through keys, values and fc, never through its output."""
    draft = make_draft()
    embeddings, features = make_rows()
    first, second = unroll(draft, embeddings, features, Alignment(2))
    (gradient,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
    assert gradient is None


def test_result_does_not_depend_on_padding_and_batch():
    draft = make_draft()
    embeddings, features = make_rows(3)
    both = list(unroll(draft, embeddings, features, Alignment(3)))[-1]
    alone = list(unroll(draft, embeddings[1:2, :6], features[1:2, :6], Alignment(3)))[-1]
    assert torch.allclose(both[1, :6], alone[0], atol=1e-12)


def test_leaky_mask_differs_and_depends_on_padding():
    draft = make_draft()
    embeddings, features = make_rows(1)
    leaky = Alignment(3, mask="leaky")
    exact = list(unroll(draft, embeddings, features, Alignment(3)))[-1]
    long = list(unroll(draft, embeddings, features, leaky))[-1]
    short = list(unroll(draft, embeddings[:, :6], features[:, :6], leaky))[-1]
    assert not torch.allclose(exact, long, atol=1e-3)
    assert not torch.allclose(long[:, :6], short, atol=1e-6)


def sequential(draft, embeddings, features, depth, bptt):
    """Compute f^1 … f^depth from the definition, by recursion on (step, position), one position and key at a time."""
    known = {}

    def input_of(step, row):
        """Return the input feature at `row` in `step`: the target's, or the one predicted in the step before."""
        if step == 1 or row == 0:
            return features[0, row]
        return estimate(step - 1, row - 1) if bptt else estimate(step - 1, row - 1).detach()

    def estimate(step, row):
        if (step, row) not in known:
            layer, attention = draft.layer, draft.layer.self_attn
            columns = [
                (max(1, column - row + step), column)
                for column in range(row + 1)  # (step of its input, position)
            ]
            bands = [draft.fuse(embeddings[0, c], input_of(s, c))[None, None] for s, c in columns]
            angles = [draft.rotary(torch.tensor([[c]])) for _, c in columns]
            pairs = [attention.keys_values(u, angle) for u, angle in zip(bands, angles, strict=True)]
            keys, values = (torch.cat(x, dim=2).repeat_interleave(2, dim=1) for x in zip(*pairs, strict=True))
            queries = attention.queries(bands[-1], angles[-1])
            weights = (queries @ keys.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1)
            known[step, row] = layer.finish(bands[-1], weights @ values)[0, 0]
        return known[step, row]

    return [torch.stack([estimate(step, row) for row in range(features.shape[1])]) for step in range(1, depth + 1)]


@pytest.mark.parametrize("gradient", ["detach", "bptt"])
def test_gradient_matches_sequential_computation(gradient):
    embeddings, features = (x[:, :5] for x in make_rows(1))
    ours, slow = make_draft(), make_draft()
    alignment = Alignment(3, step_weights=0.5, gradient=gradient)
    steps = [f[0] for f in unroll(ours, embeddings, features, alignment)]
    expected = sequential(slow, embeddings, features, 3, gradient == "bptt")
    for result in (steps, expected):
        sum(w * f.square().sum() for w, f in zip((1, 0.5, 0.25), result, strict=True)).backward()
    for step, (a, b) in enumerate(zip(steps, expected, strict=True), start=1):
        assert torch.allclose(a, b, atol=1e-12), step
    for (name, a), (_, b) in zip(ours.named_parameters(), slow.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-10), name
    assert alignment.weights == (1, 0.5, 0.25)


def test_scheduled_depth_uses_the_weights_of_its_steps():
    alignment = Alignment({0: 1, 0.5: 3}, step_weights=[1.0, 0.8, 0.6])
    assert [alignment.at(p).weights for p in (0, 0.49, 0.5, 1)] == [(1.0,), (1.0,), (1.0, 0.8, 0.6), (1.0, 0.8, 0.6)]
    assert Alignment({0: 1, 1: 3, "shape": "linear"}).at(0.5).weights == (1.0, 1.0)
    assert Alignment(2).at(0.7) == Alignment(2)


@pytest.mark.parametrize(
    "bad",
    [
        {"depth": 0}, {"depth": 2, "step_weights": (1.0,)}, {"depth": 1, "mask": "causal"}, {"depth": {0: 1, 0.5: 0}},
        {"gradient": "full"}, {"step_weights": 0}, {"depth": {0: 1, 0.5: 3}, "step_weights": (1.0,)},
    ],
)  # fmt: skip
def test_invalid_alignment_is_refused(bad):
    with pytest.raises(ValueError, match=r"model\.alignment"):
        Alignment(**bad)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_skipped_positions_do_not_change_the_gradient(depth):
    embeddings, features = make_rows(3)
    rows = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.4
    whole, part = make_draft(), make_draft()
    for draft, wanted in ((whole, None), (part, rows)):
        sum(f[rows].square().sum() for f in unroll(draft, embeddings, features, Alignment(depth), wanted)).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), part.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-10), name


def test_activation_checkpointing_does_not_change_the_gradient():
    embeddings, features = make_rows()
    kept, recomputed = make_draft(), make_draft()
    for draft, alignment in ((kept, Alignment(3)), (recomputed, Alignment(3, checkpoint=True))):
        sum(f.square().sum() for f in unroll(draft, embeddings, features, alignment)).backward()
    for (name, a), (_, b) in zip(kept.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), name
