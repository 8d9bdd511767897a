"""A trained LM head in the loss: same gradients as autograd's, no larger tensors; rows that leave the loss."""

from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hass_lightning.losses import CountedRows, DraftLoss, ExpectedAcceptance, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from live_tensors import Shapes

R, D, V, J = 13, 8, 20, 3


def make(rows=R, vocab=V, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(rows, D, generator=generator).to(dtype).requires_grad_() for _ in range(J)]
    target = torch.randn(rows, D, generator=generator).to(dtype)
    vocabulary = DraftVocabulary(torch.randn(vocab, D, generator=generator).to(dtype))
    torch.manual_seed(1)
    return steps, target, vocabulary, nn.Linear(D, vocab, bias=False).to(dtype)


def terms():
    return {"feature": FeatureRegression(0.5), "soft_ce": SoftCrossEntropy(), "top_k": TopK(k=4)}


def by_autograd(steps, target, vocabulary, lm_head, weights, counted=None, norm=None):
    """The same loss in one piece, for autograd."""
    p, total = (target @ vocabulary.weight.T).softmax(-1), 0.0
    top, indices = p.topk(4)
    for number, features in enumerate(steps if norm is None else map(norm, steps)):
        log_q = lm_head(features).log_softmax(-1)
        rows = 0.5 * F.smooth_l1_loss(features, target, reduction="none").mean(-1) - (p * log_q).sum(-1)
        rows = rows - (top * log_q.gather(-1, indices)).sum(-1)
        kept = slice(None) if counted is None else counted[number]
        total = total + weights[number] * rows[kept].sum() / R
    return total


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_gradients_of_the_lm_head_are_accumulated_over_chunks_and_steps(chunk_rows):
    steps, target, vocabulary, lm_head = make()
    weights = (1.0, 0.8, 0.64)
    inputs = [*steps, lm_head.weight]
    total = DraftLoss(terms(), chunk_rows)(
        steps, target, vocabulary, torch.zeros(R).long(), R, weights, draft_logits=lm_head, trained=[lm_head.weight]
    ).total
    expected = by_autograd(steps, target, vocabulary, lm_head, weights)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    ours, theirs = torch.autograd.grad(3 * total, inputs), torch.autograd.grad(3 * expected, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk_rows", [4, None])
def test_terms_compare_what_the_lm_head_reads_with_the_features_of_the_target(chunk_rows):
    steps, target, vocabulary, lm_head = make()
    norm = nn.RMSNorm(D).to(torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    trained = [norm.weight, lm_head.weight]
    known = {"draft_logits": lambda rows: lm_head(norm(rows)), "draft_output": norm, "trained": trained}
    total = DraftLoss(terms(), chunk_rows)(steps, target, vocabulary, torch.zeros(R).long(), R, **known).total
    expected = by_autograd(steps, target, vocabulary, lm_head, (1.0, 1.0, 1.0), norm=norm)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    inputs = [*steps, *trained]
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk_rows", [40, 64])
def test_no_vocabulary_tensor_is_larger_than_a_chunk_or_the_lm_head(chunk_rows):
    rows, vocab = 400, 3000
    steps, target, vocabulary, lm_head = make(rows, vocab, torch.float32)
    with Shapes() as shapes:
        loss = DraftLoss(terms(), chunk_rows)
        loss(
            steps, target, vocabulary, torch.zeros(rows).long(), rows, draft_logits=lm_head, trained=[lm_head.weight]
        ).total.backward()
    wide = [shape for shape in shapes.seen if vocab in shape]
    assert lm_head.weight.grad.shape == (vocab, D) and (chunk_rows, vocab) in wide
    assert max(prod(shape) for shape in wide) == chunk_rows * vocab


def test_an_lm_head_in_bf16_autocast_gets_its_gradient_from_every_chunk():
    steps, target, vocabulary, lm_head = make(dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = DraftLoss(terms(), 4)(
                steps, target, vocabulary, torch.zeros(R).long(), R, draft_logits=lm_head, trained=[lm_head.weight]
            ).total
        gradients.append(torch.autograd.grad(total, lm_head.weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=0.02, rtol=0.05)


def brute_force(mask, depth, drop_edge, alive, tokens, logits):
    """Which rows count, by following every chain: {(step, b, t)} of mask [B, T], tokens and logits by position."""
    counted = set()
    for b, t in mask.nonzero().tolist():
        for step in range(depth):
            if drop_edge and t < step:
                continue
            chain = [(n, t - step + n) for n in range(step)]  # (step, position) before this one
            known = [(n, p) for n, p in chain if p >= 0 and mask[b, p]]
            broken = [p for _, p in chain if p >= 0 and not mask[b, p]]
            known = [(n, p) for n, p in known if not broken or p > max(broken)]
            if alive is not None and any(
                tokens[b, p] < 0 or tokens[b, p] not in logits[n][b, p].topk(alive).indices for n, p in known
            ):
                continue
            counted.add((step, b, t))
    return counted


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize(("drop_edge", "alive"), [(True, None), (False, 3), (True, 8), (False, 20)])
def test_rows_without_a_root_and_rows_whose_chain_has_died_leave_the_loss(drop_edge, alive, chunk_rows):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 9, generator=generator) < 0.8
    rows = int(mask.sum())
    steps, target, vocabulary, lm_head = make(rows)
    tokens = torch.randint(-1, V, (3, 9), generator=generator)
    counted = CountedRows(mask, J, drop_edge, alive, tokens[mask])
    logits = []
    for features in steps:
        by_position = torch.zeros(3, 9, V, dtype=torch.float64)
        by_position[mask] = lm_head(features).detach()
        logits.append(by_position)
    found = brute_force(mask, J, drop_edge, alive, tokens, logits)
    keep = torch.stack([torch.tensor([(j, b, t) in found for b, t in mask.nonzero().tolist()]) for j in range(J)])
    assert (keep[0].all() and 0 < int((~keep).sum()) < rows * J) or alive == 20
    total = DraftLoss(terms(), chunk_rows)(
        steps, target, vocabulary, torch.zeros(rows).long(), R, draft_logits=lm_head, trained=[lm_head.weight],
        counted=counted,
    ).total  # fmt: skip
    expected = by_autograd(steps, target, vocabulary, lm_head, (1, 1, 1), keep)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    inputs = [*steps, lm_head.weight]
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_terms_of_hass_work_on_a_trained_head():
    steps, target, vocabulary, lm_head = make()
    loss = DraftLoss({"lk": ExpectedAcceptance(), "top_k": TopK()})
    total = loss(
        steps, target, vocabulary, torch.zeros(R).long(), R, draft_logits=lm_head, trained=[lm_head.weight]
    ).total
    (gradient,) = torch.autograd.grad(total, lm_head.weight)
    assert gradient.abs().max() > 1e-4
