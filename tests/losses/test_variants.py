"""Each loss variant against its formula, computed per element; gradients and chunking."""

import math

import pytest
import torch

from hass_lightning.losses import (
    BidirectionalTopK,
    DraftLoss,
    ExpectedAcceptance,
    JensenShannon,
    LogitDifferences,
    LossTerm,
    NormedTopK,
    RecallAtK,
    ReverseKL,
    Rows,
    SoftCrossEntropy,
    TargetRows,
    TopK,
    TopP,
    TotalVariation,
)
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary

R, V, K = 5, 9, 3


def softmax(numbers):
    total = sum(math.exp(x) for x in numbers)
    return [math.exp(x) / total for x in numbers]


def ranked(numbers, k):
    return sorted(range(len(numbers)), key=lambda v: -numbers[v])[:k]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def top_p(y, z, p, q):
    kept, mass = [], 0.0
    for v in ranked(p, V):
        if mass < 0.7:
            kept.append(v)
        mass += p[v]
    return -sum(p[v] * math.log(q[v]) for v in kept)


def normed(norm):
    def loss(y, z, p, q):
        chosen = ranked(p, K)
        weights = [p[v] for v in chosen]
        weights = softmax(weights) if norm == "softmax" else [w / sum(weights) for w in weights]
        return -sum(w * math.log(q[v]) for w, v in zip(weights, chosen, strict=True))

    return loss


def bidirectional(y, z, p, q):
    return -sum(p[v] * math.log(q[v]) for v in set(ranked(p, K)) | set(ranked(q, K)))


def recall(y, z, p, q):
    found = 0.0
    for v in ranked(p, K):
        rank = 1 + sum(sigmoid((z[u] - z[v]) / 0.3) for u in range(V) if u != v)
        found += sigmoid((K - rank) / 0.8)
    return 1 - found / K


def bild(y, z, p, q):
    total = 0.0
    for chosen in (ranked(y, K), ranked(z, K)):
        pairs = [(i, j) for a, i in enumerate(chosen) for j in chosen[a + 1 :]]
        target = softmax([(y[i] - y[j]) / 2.0 for i, j in pairs])
        draft = softmax([(z[i] - z[j]) / 2.0 for i, j in pairs])
        total += sum(a * math.log(a / b) for a, b in zip(target, draft, strict=True))
    return total


def jensen_shannon(y, z, p, q):
    return sum(0.5 * (a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))) for a, b in zip(p, q, strict=True))


VARIANTS = {
    "top_p": (TopP(top_p=0.7), top_p),
    "normed_linear": (NormedTopK(k=K), normed("linear")),
    "normed_softmax": (NormedTopK(k=K, norm="softmax"), normed("softmax")),
    "bidirectional": (BidirectionalTopK(k=K), bidirectional),
    "recall": (RecallAtK(k=K, k_temperature=0.8, rank_temperature=0.3), recall),
    "bild": (LogitDifferences(k=K, temperature=2.0), bild),
    "reverse_kl": (ReverseKL(), lambda y, z, p, q: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))),
    "jensen_shannon": (JensenShannon(), jensen_shannon),
    "total_variation": (TotalVariation(), lambda y, z, p, q: 1 - sum(map(min, p, q))),
    "lk": (ExpectedAcceptance(), lambda y, z, p, q: -math.log(sum(map(min, p, q)))),
}


def logits(seed=0, rows=R, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, rows, V, generator=generator, dtype=torch.float64)


def evaluate(term, target_logits, draft_logits):
    features = torch.zeros(len(target_logits), 1, dtype=torch.float64)
    return term(Rows(features, draft_logits, TargetRows(features, target_logits), 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_value_matches_the_formula_and_gradient_is_correct(name):
    term, formula = VARIANTS[name]
    target, draft = logits()
    expected = [formula(y, z, softmax(y), softmax(z)) for y, z in zip(target.tolist(), draft.tolist(), strict=True)]
    assert evaluate(term, target, draft).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: evaluate(term, target, z), draft.requires_grad_())


@pytest.mark.parametrize("name", VARIANTS)
def test_chunked_equals_unchunked(name):
    term, _ = VARIANTS[name]
    target, draft = logits()
    identity = DraftVocabulary(torch.eye(V, dtype=torch.float64))
    features = draft.clone().requires_grad_()
    wanted = torch.zeros(R, dtype=torch.int64)
    whole = DraftLoss({name: term})([features], target, identity, wanted, R).total
    parts = DraftLoss({name: term}, chunk_rows=2)([features], target, identity, wanted, R).total
    assert torch.allclose(whole, evaluate(term, target, draft).mean(), atol=1e-12)
    assert torch.allclose(parts, whole, atol=1e-12)
    a, b = (torch.autograd.grad(loss, features)[0] for loss in (whole, parts))
    assert torch.allclose(a, b, atol=1e-12)


def test_divergences_are_finite_when_fp32_underflows():
    target, draft = logits(scale=200.0)
    for name in ("reverse_kl", "jensen_shannon", "total_variation", "lk", "recall", "bild"):
        z = draft.float().requires_grad_()
        value = evaluate(VARIANTS[name][0], target.float(), z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert torch.isfinite(value).all(), name
        assert torch.isfinite(gradient).all(), name


def test_temperature_applies_to_both_distributions():
    target, draft = logits()
    identity, wanted = DraftVocabulary(torch.eye(V, dtype=torch.float64)), torch.zeros(R, dtype=torch.int64)
    loss = DraftLoss({"ce": SoftCrossEntropy()}, temperature=2.0)([draft], target, identity, wanted, R).total
    expected = evaluate(SoftCrossEntropy(), target / 2, draft / 2).mean()
    assert torch.allclose(loss, expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"model\.loss\.temperature=0"):
        DraftLoss({"ce": SoftCrossEntropy()}, temperature=0)


def test_scheduled_weights_and_ks_follow_the_progress():
    loss = DraftLoss({"ce": SoftCrossEntropy(), "top_k": TopK(weight={0: 0, 0.8: 1}, k={0: 1, 0.5: K})})
    assert (loss.terms["top_k"].weight, loss.terms["top_k"].k) == (0, 1)
    loss.set_progress(0.6)
    assert (loss.terms["top_k"].weight, loss.terms["top_k"].k) == (0, K)
    loss.set_progress(0.8)
    assert (loss.terms["top_k"].weight, loss.terms["ce"].weight) == (1, 1)
    target, draft = logits()
    p = target.softmax(-1).topk(K)
    expected = -(p.values * draft.log_softmax(-1).gather(-1, p.indices)).sum(-1)
    assert torch.allclose(evaluate(loss.terms["top_k"], target, draft), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TopP(top_p=-0.1), "<TopP>.top_p=-0.1"),
        (lambda: LogitDifferences(k=1), "<LogitDifferences>.k=1"),
        (lambda: TopK(k={0: 10, 0.5: 0}), "<TopK>.k"),
        (lambda: NormedTopK(norm="max"), "norm=max"),
        (lambda: RecallAtK(rank_temperature=0), "rank_temperature=0"),
        (lambda: LogitDifferences(temperature=0), "temperature=0"),
        (lambda: LossTerm({0: 1, 2: 0}), "<LossTerm>.weight"),
    ],
)
def test_invalid_values_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
