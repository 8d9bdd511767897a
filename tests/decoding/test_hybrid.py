"""decoding=hybrid: the copied branch in the head's tree, its rates, and the head reading skipped tokens."""

import random

import pytest
import torch
from decoding_toys import Enumerator, greedy_text, make_draft, make_target, total_variation
from test_lossless_sampling import PROMPT, SAMPLINGS, analytic, toy
from test_tree import random_candidates

from hass_lightning.decoding import DecodingModels, DynamicTree, Hybrid, PromptLookup, hybrid
from hass_lightning.decoding.drafting import DynamicTreeProposer, HeadRows
from hass_lightning.decoding.engine import decode_cycles
from hass_lightning.decoding.hybrid import Copier, HybridProposer, RecentMean, add_branch, first_rate
from hass_lightning.decoding.prompt_lookup import SuffixIndex
from hass_lightning.decoding.tree import select_nodes
from hass_lightning.types import Sampling


def paths_of(parents, ids):
    """Return the tokens from the root to each candidate."""
    paths = []
    for parent, token in zip(parents.tolist(), ids.tolist(), strict=True):
        paths.append(((paths[parent] if parent >= 0 else ()), token))
    return paths


def a_search(seed):
    """Return candidates with distinct siblings, many ties, and a copied path that follows them for some levels."""
    depth, width = 1 + seed % 4, 1 + seed % 5
    scores, parents, depths = random_candidates(seed, depth, width)
    rng = random.Random(seed)
    ids = torch.tensor([token for _ in range(len(scores) // width) for token in rng.sample(range(7), width)])
    branch, node = [], -1
    for _ in range(rng.randint(1, 8)):
        children = [c for c in range(len(ids)) if int(parents[c]) == node and node > -2]
        node = rng.choice(children) if children and rng.random() < 0.8 else -2
        branch.append(int(ids[node]) if node >= 0 else rng.randrange(7))
        if node < 0:  # a random token can also be a candidate
            found = [c for c in children if int(ids[c]) == branch[-1]]
            node = found[0] if found else -2
    log_rates = -torch.tensor([rng.choice([0.0, 0.5, 1.0]) for _ in branch])
    return scores, parents, ids, depths, torch.tensor(branch), log_rates, depth


@pytest.mark.parametrize("seed", range(40))
def test_a_branch_is_merged_into_the_search(seed):
    scores, parents, ids, depths, branch, log_rates, depth = a_search(seed)
    expected = dict(zip(paths_of(parents, ids), scores.tolist(), strict=True))
    path, score = (), 0.0
    for token, rate in zip(branch.tolist(), log_rates.tolist(), strict=True):
        path, score = (path, token), score + rate
        score = expected[path] = max(score, expected.get(path, -float("inf")))

    merged, above, tokens = add_branch(scores, parents, ids, branch, log_rates, depth)
    paths = paths_of(above, tokens)
    assert len(merged) == len(scores) + len(branch)
    there = {p: s for p, s in zip(paths, merged.tolist(), strict=True) if s > -float("inf")}
    assert there == expected
    assert sum(s == -float("inf") for s in merged.tolist()) == len(merged) - len(expected)

    all_depths = torch.cat([torch.arange(1, len(branch) + 1), depths])
    for count in {1, len(scores) // 2 + 1, len(scores)}:
        chosen, shape = select_nodes(merged, above, all_depths, count, max(depth, len(branch)))
        assert torch.isfinite(merged[chosen]).all()  # no duplicate is ever needed
        offered = set()
        for node, candidate in enumerate(chosen.tolist(), start=1):
            parent = int(above[candidate])
            assert shape.parents[node] == (0 if parent < 0 else 1 + chosen.tolist().index(parent))
            offered.add((int(shape.parents[node]), int(tokens[candidate])))
        assert len(offered) == count  # no token twice below one parent
        assert torch.equal(shape.depths[1:], all_depths[chosen])


def test_searches_and_branches_meet():
    """The random cases above contain merged paths of every length."""
    merged = []
    for seed in range(40):
        *search, _, branch, log_rates, depth = a_search(seed)
        scores, _, _ = add_branch(*search, branch, log_rates, depth)
        merged.append(int((scores == -torch.inf).sum()))
    assert {0, 1, 2, 3} <= set(merged)


def longest_suffix(tokens, max_ngram):
    """Search for the longest suffix by scanning, which the index avoids."""
    for n in range(max_ngram, 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return n, start + n
    return None


@pytest.mark.parametrize("max_ngram", [1, 2, 4])
def test_the_index_finds_what_a_rescan_finds(max_ngram):
    rng = random.Random(max_ngram)
    index = SuffixIndex([0], max_ngram)
    for _ in range(300):
        index.append(rng.randrange(4))
        assert index.find() == longest_suffix(index.tokens, max_ngram)


def test_a_match_is_followed_until_it_breaks():
    copier = Copier(1, 5, max_ngram=2)
    for token in [2, 3, 4, 9, 8]:
        copier.append(token)
    assert copier.copy(3) == ([], [])
    for token, length, following in ((1, 1, [2, 3]), (2, 2, [3, 4]), (3, 3, [4, 9]), (4, 4, [9, 8]), (3, 1, [4, 3])):
        copier.append(token)
        copied, rates = copier.copy(2)
        assert copied == following
        assert len(rates) == 2 and copier.match is not None and copier.match[0] == length
    # a loop continues with itself
    for token in [5, 6, 5, 6]:
        copier.append(token)
    assert copier.copy(5)[0] == [5, 6, 5, 6, 5]


def test_rates_follow_the_text_and_not_the_prompt():
    def after(prompt, answer):
        copier = Copier(prompt[0], len(prompt), max_ngram=1)
        for token in [*prompt[1:], *answer]:
            copier.append(token)
        return copier.copy(3)[1]

    loop = [1, 2] * 4
    unseen = [first_rate(length) for length in (8, 8, 8)]
    assert after([*loop, *loop], []) == pytest.approx(unseen)
    assert after(loop, loop)[0] > unseen[0]  # the copies were correct
    # a copy of length 1 is wrong each time
    assert after([1, 2, 1, 3, 1, 4, 1], [5, 1, 6, 1, 7, 1])[0] < first_rate(1)
    assert all(0 < rate < 1 for rate in after(loop, loop * 50) + after([1], [2, 1, 3, 1] * 50))


def test_a_recent_mean_starts_at_its_guess_and_forgets():
    mean = RecentMean(0.5, weight=2, decay=0.5)
    assert mean.value == 0.5
    mean.add(2)
    assert mean.value == pytest.approx((1 + 2) / 3)
    mean.add(0)
    assert mean.value == pytest.approx((1 + 1) / 3.5)
    for _ in range(100):
        mean.add(3)
    assert mean.value == pytest.approx((1 + 6) / 4)


@pytest.fixture(scope="module")
def models():
    target = make_target(vocab=11, dtype=torch.float64)
    return DecodingModels(target, make_draft(target))


@pytest.fixture
def expect_of_trees(monkeypatch):
    """Sets the expected tokens of the trees: zero, so that copies replace all trees, or so many that they never do."""
    return lambda tokens: monkeypatch.setattr(hybrid, "FIRST_TREES", tokens)


@pytest.mark.parametrize("expected", [-100, 100], ids=["alone", "in the tree"])
def test_both_ways_are_lossless(expected, expect_of_trees, models, monkeypatch):
    expect_of_trees(expected)
    for decoder in (Hybrid(8, 3, 3), Hybrid(30, 2, 5, max_ngram=6), Hybrid(2, 1, 1)):
        for prompt in ([3, 1, 4, 1, 5], [2], [7, 8, 9, 7, 8, 9, 7, 8]):
            assert decoder.generate(models, prompt, 24).token_ids == greedy_text(models.target, prompt, 24)
    decoder = Hybrid(num_nodes=5, depth=2, width=2, max_ngram=1)
    for sampling, length in SAMPLINGS:
        assert distance(decoder, sampling, length, monkeypatch) < 1e-9


def distance(decoder, sampling, length, monkeypatch):
    """Return the total variation distance between the texts of a decoder, over all outcomes, and the target's."""
    found = Enumerator(monkeypatch).distribution(
        lambda: tuple(decoder.generate(toy(), PROMPT, length, sampling).token_ids)
    )
    return total_variation(found, analytic(sampling, length))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_a_head_that_was_spared_drafts_as_if_it_had_not_been(sampling, models):
    """Each search of the head equals that of a head which read every cycle; several cycles were skipped before some."""
    compared, missed, gaps = 0, 0, []
    for prompt in ([3, 1, 4, 1, 5], [2, 7, 2], [7, 8, 9, 7, 8, 9, 7, 8]):
        ours = HybridProposer(models, prompt, len(prompt) + 60, num_nodes=8, depth=3, width=3, max_ngram=3)
        always = DynamicTreeProposer(models, 8, 3, 3, len(prompt) + 60)
        found: list[tuple] = []
        search = ours.tree.search

        class Both:
            max_nodes = 8

            def propose(self, token_ids, features, ours=ours, always=always, found=found):
                nonlocal compared, missed
                expected = always.search(token_ids, features)
                found.clear()
                tree = ours.propose(token_ids, features)
                if found:
                    torch.testing.assert_close(found[0], expected, atol=1e-10, rtol=0)
                    compared += 1
                    gaps.append(missed)
                    missed = 0
                else:
                    missed += 1
                return tree

        ours.tree.search = lambda *given, search=search, found=found: found.append(search(*given)) or found[-1]
        generator = torch.Generator().manual_seed(3)
        list(decode_cycles(models, Both(), prompt, 60, sampling=sampling, generator=generator))
    assert compared > 10
    assert max(gaps) >= 2, gaps


def test_a_copy_alone_spares_the_head(models, monkeypatch, expect_of_trees):
    reads = []
    accept = HeadRows.accept
    monkeypatch.setattr(
        HeadRows, "accept", lambda rows, ids, features: reads.append(ids) or accept(rows, ids, features)
    )
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    text = greedy_text(models.target, prompt, 60)

    def run():
        reads.clear()
        result = Hybrid(8, 3, 3).generate(models, prompt, 60)
        assert result.token_ids == text
        return len(reads), len(result.accepted), result

    some, cycles, result = run()
    assert 0 < some < cycles
    assert max(result.accepted) == 7  # a copy of all nodes, correct to its end
    # the head has read the text once and in order
    read = [token for ids in reads for token in ids]
    assert read == [*prompt, *text][1 : 1 + len(read)]
    expect_of_trees(100)
    always, cycles, _ = run()
    assert always == cycles
    expect_of_trees(-100)
    fewest, cycles, _ = run()
    assert fewest < some


def test_it_accepts_what_either_accepts(models):
    """On a text with repetitions it needs fewer target forwards than both of its components."""
    prompts = [[3, 1, 4, 1, 5], [2], [7, 8, 9, 7, 8, 9, 7, 8], [5, 5, 1]]
    decoders = Hybrid(8, 3, 3), DynamicTree(8, 3, 3), PromptLookup(num_tokens=7)
    cycles = [sum(len(d.generate(models, prompt, 60).accepted) for prompt in prompts) for d in decoders]
    assert cycles[0] < min(cycles[1:])


def test_a_token_offered_twice_shows_in_the_texts(monkeypatch, expect_of_trees):
    """If the copy was added to the head's candidates without merging, the distribution would not be the target's."""
    expect_of_trees(100)
    decoder, (sampling, length) = Hybrid(num_nodes=5, depth=2, width=2, max_ngram=1), SAMPLINGS[0]

    def unmerged(scores, parents, ids, branch, log_rates, depth):
        count = len(branch)
        path = torch.arange(-1, count - 1)
        below = torch.where(parents >= 0, parents + count, parents)
        return torch.cat([log_rates.cumsum(0), scores]), torch.cat([path, below]), torch.cat([branch, ids])

    assert distance(decoder, sampling, length, monkeypatch) < 1e-9
    monkeypatch.setattr(hybrid, "add_branch", unmerged)
    assert distance(decoder, sampling, length, monkeypatch) > 1e-3
