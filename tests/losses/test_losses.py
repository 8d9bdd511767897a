"""Loss terms against per-element formulas; chunking, gradients and precision of `DraftLoss`."""

from collections import Counter
from math import prod

import pytest
import torch

from hass_lightning.losses import (
    DraftLoss,
    FeatureRegression,
    LossTerm,
    Rows,
    SoftCrossEntropy,
    TargetRows,
    TopK,
    draft_loss,
)
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from live_tensors import Shapes

R, D, V = 7, 6, 13


def make(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(R, D, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]
    target = torch.randn(R, D, generator=generator, dtype=dtype)
    vocabulary = DraftVocabulary(torch.randn(V, D, generator=generator, dtype=dtype))
    return steps, target, vocabulary


def hass(chunk_rows=1024, k=4):
    terms = {"feature": FeatureRegression(1.0), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(1.0, k=k)}
    return DraftLoss(terms, chunk_rows)


def official(steps, target, vocabulary, k):
    """The official loss (docs/method.md, HAD), computed per element."""
    total = 0.0
    for f in steps:
        for r in range(R):
            p = (vocabulary.weight @ target[r]).softmax(0)
            log_q = (vocabulary.weight @ f[r]).log_softmax(0)
            difference = (f[r] - target[r]).abs()
            smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
            top = p.argsort(descending=True)[:k]
            total = total + (smooth - 0.1 * (p * log_q).sum() - (p[top] * log_q[top]).sum()) / R
    return total


def test_value_and_gradient_match_the_official_formula():
    steps, target, vocabulary = make()
    ours = hass()(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R).total
    expected = official(steps, target, vocabulary, 4)
    assert torch.allclose(ours, expected, atol=1e-12)
    ours_gradients = torch.autograd.grad(ours, steps, retain_graph=True)
    for a, b in zip(ours_gradients, torch.autograd.grad(expected, steps), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7])
def test_chunked_equals_unchunked(chunk_rows):
    steps, target, vocabulary = make()
    wanted = (target @ vocabulary.weight.T).argmax(-1)
    whole, parts = (hass(c)(steps, target, vocabulary, wanted, R, (1.0, 0.5, 0.25)) for c in (1024, chunk_rows))
    assert torch.allclose(whole.total, parts.total, atol=1e-12)
    assert torch.equal(whole.hits, parts.hits)
    for a, b in zip(torch.autograd.grad(whole.total, steps), torch.autograd.grad(parts.total, steps), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [40, 64])
def test_no_vocabulary_tensor_is_larger_than_a_chunk(chunk_rows):
    """No tensor of forward, backward, metrics or soft targets has the vocabulary times more than a chunk."""
    rows, hidden, vocab = 200, 16, 3000
    steps = [torch.randn(rows, hidden, requires_grad=True) for _ in range(3)]
    vocabulary = DraftVocabulary(torch.randn(vocab, hidden))
    with Shapes() as shapes:
        hass(chunk_rows)(steps, torch.randn(rows, hidden), vocabulary, torch.zeros(rows).long(), rows).total.backward()
    wide = [shape for shape in shapes.seen if vocab in shape]
    assert (chunk_rows, vocab) in wide
    assert max(prod(shape) for shape in wide) == chunk_rows * vocab


def test_default_chunk_size_depends_on_the_vocabulary(monkeypatch):
    steps, target, vocabulary = make()
    monkeypatch.setattr(draft_loss, "CHUNK_BYTES", (4 * V * 3 + 5, 0))
    with Shapes() as shapes:
        hass(None)(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R)
    assert {shape[0] for shape in shapes.seen if shape[1:] == (V,)} - {D} == {3, 1}  # (D, V) is the LM head


def test_soft_targets_and_top_k_are_computed_once_per_chunk(monkeypatch):
    steps, target, vocabulary = make()
    calls = Counter()
    for name in ("softmax", "topk"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    terms = {"soft_ce": SoftCrossEntropy(), "a": TopK(k=4), "b": TopK(0.5, k=4)}
    DraftLoss(terms, 4)(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R)
    assert calls == {"softmax": 2, "topk": 2}  # once in each of the two chunks


class ByLogits(LossTerm):
    """The HASS loss without the feature term, computed from the logits."""

    def forward(self, rows):
        log_q = rows.draft_logits.log_softmax(-1)
        top, indices = rows.target.top_k(4)
        return -0.1 * (rows.target.probs * log_q).sum(-1) - (top * log_q.gather(-1, indices)).sum(-1)


def test_reductions_have_the_same_gradient_as_the_logits():
    """Separately, and together with a term that uses the logits."""
    steps, target, vocabulary = make()
    short = {"soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(k=4)}
    totals = [
        DraftLoss(terms, 3)(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R).total
        for terms in (short, {"long": ByLogits()}, {**short, "long": ByLogits(2.0)}, {"top_k": TopK(k=4)})
    ]
    gradients = [torch.autograd.grad(total, steps) for total in totals]
    torch.testing.assert_close(totals[0], totals[1], atol=1e-12, rtol=0)
    for both, long, mixed in zip(*gradients[:3], strict=True):
        torch.testing.assert_close(both, long, atol=1e-12, rtol=0)
        torch.testing.assert_close(mixed, 3 * long, atol=1e-12, rtol=0)
    standalone = Rows(steps[0], vocabulary.logits(steps[0]), TargetRows(target, vocabulary.logits(target)), 1)
    (expected,) = torch.autograd.grad(TopK(k=4)(standalone).sum() / R, steps[0])
    torch.testing.assert_close(gradients[3][0], expected, atol=1e-12, rtol=0)


def test_top_k_of_the_whole_vocabulary_equals_soft_cross_entropy():
    steps, target, vocabulary = make()
    rows = Rows(steps[0], vocabulary.logits(steps[0]), TargetRows(target, vocabulary.logits(target)), 1)
    assert torch.allclose(TopK(k=V)(rows), SoftCrossEntropy()(rows), atol=1e-12)


def test_gradcheck():
    steps, target, vocabulary = make()

    def total(*features):
        return hass(3)(features, target, vocabulary, torch.zeros(R, dtype=torch.int64), R).total

    assert torch.autograd.gradcheck(total, tuple(steps))


def test_term_with_weight_zero_is_not_computed():
    class Explodes(SoftCrossEntropy):
        def forward(self, rows):
            raise AssertionError("computed")

    steps, target, vocabulary = make()
    loss = DraftLoss({"feature": FeatureRegression(), "off": Explodes(0.0)})
    output = loss(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R)
    assert set(output.values) == {"feature/step1", "feature/step2", "feature/step3"}


def test_probabilities_are_renormalised_over_a_pruned_vocabulary():
    _, target, vocabulary = make()
    kept = torch.tensor([1, 4, 5, 9])
    pruned = DraftVocabulary(vocabulary.weight, token_ids=kept)
    rows = TargetRows(target, pruned.logits(target))
    full = vocabulary.logits(target).softmax(-1)[:, kept]
    assert torch.allclose(rows.probs, full / full.sum(-1, keepdim=True), atol=1e-12)
    assert pruned.to_indices(torch.tensor([5, 0])).tolist() == [2, -1]
    assert pruned.to_token_ids(torch.tensor([[3]])).tolist() == [[9]]


def test_invalid_terms_are_refused():
    with pytest.raises(ValueError, match=r"model\.loss\.terms\.<TopK>\.k=0"):
        TopK(k=0)
    with pytest.raises(ValueError, match="nothing to learn"):
        DraftLoss({"top_k": TopK(0.0)})
    with pytest.raises(ValueError, match="negative"):
        SoftCrossEntropy(-1.0)


def test_terms_are_computed_in_fp32_under_autocast():
    """Autocast may round the products of the LM head, but not sums over the vocabulary."""
    steps, target, vocabulary = make(dtype=torch.float32)
    vocabulary.weight.mul_(8)  # logits as large as those of a real model

    def value_and_gradient(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = loss(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), R).total
        return total, torch.autograd.grad(total, steps)

    class Exact(DraftLoss):
        def _logits(self, *arguments):  # the only place where autocast applies
            with torch.autocast("cpu", enabled=False):
                return super()._logits(*arguments)

    loss = Exact(hass().terms)
    (plain, gradients), (cast, cast_gradients) = value_and_gradient(False), value_and_gradient(True)
    assert torch.equal(plain, cast)
    assert all(torch.equal(a, b) for a, b in zip(gradients, cast_gradients, strict=True))


def test_fp16_gradients_do_not_overflow_or_underflow():
    steps, target, vocabulary = make(dtype=torch.float32)
    exact = hass()(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), 1e5).total
    expected = torch.autograd.grad(65536 * exact, steps)
    half = [step.detach().half().requires_grad_() for step in steps]
    total = hass()(half, target, vocabulary, torch.zeros(R, dtype=torch.int64), 1e5).total
    for ours, theirs in zip(torch.autograd.grad(total * 65536, half), expected, strict=True):
        assert torch.allclose(ours.float(), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


class Constant(LossTerm):
    """Depends on the draft only in the first step."""

    def forward(self, rows):
        return rows.draft_features.sum(-1) if rows.step == 1 else torch.zeros(len(rows.draft_features))


def test_a_term_may_not_depend_on_the_draft():
    steps, target, vocabulary = make(dtype=torch.float32)
    total = DraftLoss({"mine": Constant(1.0)})(steps, target, vocabulary, torch.zeros(R, dtype=torch.int64), 1).total
    first, *others = torch.autograd.grad(total, steps)
    assert torch.equal(first, torch.ones(R, D)) and not any(other.any() for other in others)
