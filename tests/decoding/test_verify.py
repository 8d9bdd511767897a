"""Temperature > 0: the acceptance rules are lossless. All outcomes of one cycle are enumerated on a toy vocabulary.

The toy target is a table of distributions by context. The tokens of a cycle, continued with the target's distributions
to a fixed length, must have exactly the distribution of the target's texts.
"""

import random
from functools import partial

import pytest
import torch
from decoding_toys import Enumerator, total_variation

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding import verify as rules
from hass_lightning.decoding.tree import DraftTree, StaticPlan, chain_shape
from hass_lightning.types import Sampling

V = 5
PROCESSED = Sampling(temperature=0.6, top_p=0.85, top_k=4)
SAMPLINGS = [Sampling(1.0), Sampling(1.7), Sampling(1.0, top_p=0.7), Sampling(1.0, top_k=2), PROCESSED]


def logits_after(seed, context):
    """Return the logits of the toy target (or draft) after the root and `context`."""
    generator = torch.Generator().manual_seed(hash((seed, *context)) % 2**31)
    return 2 * torch.randn(V, generator=generator, dtype=torch.float64)


def continuation(seed, sampling, length, context=()):
    """Return {text: probability} for the target's texts of `length` tokens that start with `context`."""
    if len(context) >= length:
        return {context[:length]: 1.0}
    found = {}
    for token, weight in enumerate(draws.probabilities(logits_after(seed, context), sampling).tolist()):
        if weight > 0:
            for text, rest in continuation(seed, sampling, length, (*context, token)).items():
                found[text] = found.get(text, 0) + weight * rest
    return found


def emitted(tree, contexts, seed, sampling):
    """Return the tokens of one cycle: the accepted ones and the bonus token."""
    logits = torch.stack([logits_after(seed, context) for context in contexts])
    path, bonus = rules.verify(tree, logits, sampling, None)
    return (*tree.token_ids[path][1:].tolist(), int(bonus))


def deterministic_cycle(paths, seed, sampling):
    """Return a cycle on a fixed tree whose siblings are distinct, arbitrary tokens."""
    nodes = [(), *sorted(paths, key=lambda path: (len(path), path))]
    contexts = {(): ()}
    for path in nodes[1:]:
        order = random.Random(str((seed, path[:-1]))).sample(range(V), V)
        contexts[path] = (*contexts[path[:-1]], order[path[-1]])
    tokens = torch.tensor([0, *(contexts[path][-1] for path in nodes[1:])])
    tree = DraftTree(tokens, StaticPlan.build(tuple(paths)).shape)
    return emitted(tree, [contexts[path] for path in nodes], seed, sampling)


def sampled_cycle(depth, seed, sampling):
    """Return a cycle on a chain sampled from a draft that is unrelated to the target."""
    context, q = (), []
    for _ in range(depth):
        q.append(draws.probabilities(logits_after(seed + 1000, context), sampling))
        context = (*context, int(draws.categorical(q[-1], None)))
    full = torch.stack([*q, torch.zeros(V, dtype=torch.float64)])
    tree = DraftTree(torch.tensor([0, *context]), chain_shape(depth), full)
    return emitted(tree, [context[:length] for length in range(depth + 1)], seed, sampling)


def error(enumerator, cycle, seed, sampling, length):
    """Return the total variation distance between the distributions of the cycle and the target."""
    found = {}
    for prefix, weight in enumerator.distribution(partial(cycle, seed, sampling)).items():
        for text, rest in continuation(seed, sampling, length, prefix).items():
            found[text] = found.get(text, 0) + weight * rest
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return total_variation(found, continuation(seed, sampling, length))


def random_paths(seed, count=5):
    rng = random.Random(seed)
    paths = [()]
    while len(paths) <= count:
        child = (*rng.choice(paths), rng.randrange(V))
        if child not in paths and len(child) <= 3:
            paths.append(child)
    return paths[1:]


WIDE = [(0,), (1,), (2,), (0, 0), (0, 1)]
CYCLES = {
    "tree": (partial(deterministic_cycle, WIDE), 3),
    "greedy chain": (partial(deterministic_cycle, [(0,), (0, 0)]), 3),
    "sampled chain": (partial(sampled_cycle, 2), 3),
}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", CYCLES)
def test_exact_distribution_of_a_cycle(rule, sampling, monkeypatch):
    cycle, length = CYCLES[rule]
    for seed in range(2):
        assert error(Enumerator(monkeypatch), cycle, seed, sampling, length) < 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_exact_distribution_of_random_trees(seed, monkeypatch):
    cycle = partial(deterministic_cycle, random_paths(seed))
    assert error(Enumerator(monkeypatch), cycle, seed, SAMPLINGS[seed % len(SAMPLINGS)], 4) < 1e-9


def test_children_that_cover_the_support(monkeypatch):
    """If the children cover the whole support, one of them must be accepted."""
    cycle = partial(deterministic_cycle, [(rank,) for rank in range(V)])
    assert error(Enumerator(monkeypatch), cycle, 0, Sampling(1.0), 2) < 1e-9


# Planted faults: each breaks one line of the rules and must change the distribution.


def thresholds_without_renormalising(tree, p):
    return p[tree.shape.parents, tree.token_ids].index_fill(0, torch.tensor([0]), 1.0)


def residual_that_keeps_the_rejected(tree, p, last):
    return p[last][0]


def residual_of_positive_q(tree, p, last):
    return (p[last] - tree.q[last]).abs()[0] if tree.q is not None else p[last][0]


def verify_without_processor_on_the_bonus(tree, logits, sampling, generator):
    """The fault of the official code (docs/method.md): the bonus token after a full path has temperature 1."""
    p = draws.probabilities(logits, sampling)
    accepted = draws.bernoulli(rules.thresholds(tree, p), generator)
    path = rules.accepted_path(rules.first_sibling(accepted, tree.shape), tree.shape)
    raw = draws.probabilities(logits, Sampling(1.0))
    return path, draws.categorical(rules.residual(tree, raw, rules.last_node(path)), generator)


def any_sibling(accepted, shape):
    """Two accepted siblings both count as accepted, so that the deeper or later one wins."""
    return accepted


FAULTS = {
    "residual not renormalised": ("thresholds", thresholds_without_renormalising, "tree"),
    "rejected child kept (tree)": ("residual", residual_that_keeps_the_rejected, "tree"),
    "rejected child kept (greedy chain)": ("residual", residual_that_keeps_the_rejected, "greedy chain"),
    "rejected child kept (sampled)": ("residual", residual_that_keeps_the_rejected, "sampled chain"),
    "residual not cut at zero": ("residual", residual_of_positive_q, "sampled chain"),
    "bonus without processor (tree)": ("verify", verify_without_processor_on_the_bonus, "tree"),
    "bonus without processor (sampled)": ("verify", verify_without_processor_on_the_bonus, "sampled chain"),
    "later sibling wins": ("first_sibling", any_sibling, "tree"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, monkeypatch):
    where, broken, rule = FAULTS[fault]
    cycle, length = CYCLES[rule]
    monkeypatch.setattr(rules, where, broken)
    sampling = PROCESSED if "processor" in fault else Sampling(1.0)
    worst = max(error(Enumerator(monkeypatch), cycle, seed, sampling, length) for seed in range(2))
    assert worst > 1e-3


def test_residual_is_never_empty_after_rounding():
    """If rounding rejects the whole support, the bonus token is sampled from the target's distribution."""
    tree = DraftTree(torch.tensor([0, 1, 2]), StaticPlan.build(((0,), (1,))).shape)
    p = torch.tensor([[0, 0.4, 0.6, 0, 0]] * 3)
    assert torch.equal(rules.residual(tree, p, torch.tensor([0])), p[0])
    assert rules.thresholds(tree, p)[2] == pytest.approx(1)


def test_greedy_accepts_the_matching_path():
    tree = DraftTree(torch.tensor([9, 1, 2, 3, 4, 3]), StaticPlan.build(((0,), (1,), (0, 0), (1, 0), (1, 1))).shape)
    logits = torch.zeros(6, 10)
    for node, token in enumerate([2, 3, 3, 0, 0, 7]):
        logits[node, token] = 1
    path, bonus = rules.verify(tree, logits, Sampling(), None)
    assert path.tolist() == [True, False, True, False, False, True] and int(bonus) == 7
