"""Simulated acceptance equals a slow loop that drafts every chain separately."""

import pytest
import torch
from training_toys import make_module

from hass_lightning.measure.simulate import simulated_hits

WHOLE = torch.tensor([16, 16])


def slow_counts(draft, head, vocabulary, input_ids, features, loss_mask, lengths, depth):
    """Draft chain by chain as in decoding: target features up to the start, then predicted features."""
    counts = {"starts": 0} | {
        f"{n}{j}": 0 for n in ("hits", "survived", "reached", "forced") for j in range(1, depth + 1)
    }
    batch, length = input_ids.shape
    asked = [[bool(loss_mask[b, t]) and t < lengths[b] - 2 for t in range(length - 2)] for b in range(batch)]

    def true_hit(b, row):
        """Return whether the head is right at a position where it has read target features only."""
        estimate = draft(head.embed(input_ids[b, 1 : row + 2])[None], features[b : b + 1, : row + 1])[0, row]
        return int(vocabulary.to_token_ids(vocabulary.logits(estimate).argmax(-1))) == int(input_ids[b, row + 2])

    for b in range(batch):
        for start in range(-depth, length - 2):
            alive = start >= 0 and asked[b][start]
            counts["starts"] += alive
            rows = list(features[b, : max(0, start + 1)])
            for step in range(1, depth + 1):
                row = start + step - 1
                if row >= length - 2:
                    break
                if row < 0:
                    continue
                if row >= len(rows):  # positions before any prediction have the first target feature
                    rows.append(features[b, 0] if row == 0 else estimate)  # noqa: F821
                embeddings = head.embed(input_ids[b, 1 : row + 2])
                estimate = draft(embeddings[None], torch.stack(rows[: row + 1])[None])[0, row]
                token = int(vocabulary.to_token_ids(vocabulary.logits(estimate).argmax(-1)))
                hit = asked[b][row] and token == int(input_ids[b, row + 2])
                counts[f"hits{step}"] += hit
                counts[f"reached{step}"] += alive and asked[b][row]
                counts[f"forced{step}"] += alive and asked[b][row] and true_hit(b, row)
                alive = alive and hit
                counts[f"survived{step}"] += alive
    return counts


@pytest.fixture
def batch(tiny):
    """Answers that the head sometimes predicts: two sequences, one with two answers, one with padding."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, 250, (2, 16))
    loss_mask = torch.zeros(2, 16, dtype=torch.bool)
    loss_mask[0, 3:8] = loss_mask[0, 10:15] = loss_mask[1, 2:9] = True
    return input_ids, tiny.encode(input_ids).clone(), loss_mask


def guessed(module, input_ids, features, loss_mask, depth):
    """Return the batch with some answer tokens replaced by the head's predictions, so chains of all lengths occur."""
    input_ids = input_ids.clone()
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        embeddings = module.head.embed(input_ids[:, 1:])
        with torch.no_grad():
            estimate = module.draft(embeddings, features[:, :-1])
        proposed = module.vocabulary.to_token_ids(module.vocabulary.logits(estimate).argmax(-1))
        chosen = (torch.rand(2, 14, generator=draw) < 0.7) & loss_mask[:, :14]
        input_ids[:, 2:][chosen] = proposed[:, :14][chosen]
    return input_ids


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("chunk_rows", [3, 2048])
def test_counts_equal_the_slow_loop(tiny, batch, depth, pruned, chunk_rows):
    module = make_module(tiny, token_ids=torch.arange(0, 259, 2) if pruned else None)
    input_ids, features, loss_mask = batch
    input_ids = guessed(module, input_ids, features, loss_mask, depth)
    arguments = (module.draft, module.head, module.vocabulary, input_ids, features, loss_mask, WHOLE, depth)
    counts = {name: int(value) for name, value in simulated_hits(*arguments, chunk_rows=chunk_rows).items()}
    with torch.no_grad():
        assert counts == slow_counts(*arguments)
    assert counts["starts"] == int(loss_mask[:, :14].sum())
    assert 0 < counts["survived1"] == counts["hits1"] < counts["starts"]


def test_padding_does_not_change_the_counts_of_an_answer(tiny, batch):
    """The last position of a truncated answer has no next token to hit, with or without padding after it."""
    module = make_module(tiny)
    input_ids, features, loss_mask = batch
    loss_mask[1, 8:] = False
    loss_mask[1, 2:8] = True  # truncated at token 8: position 7 predicts a token that does not exist
    parts = (module.draft, module.head, module.vocabulary)
    both = simulated_hits(*parts, input_ids, features, loss_mask, torch.tensor([16, 9]), 3)
    alone = [
        simulated_hits(*parts, input_ids[b : b + 1, :n], features[b : b + 1, :n], loss_mask[b : b + 1, :n],
                       torch.tensor([n]), 3)
        for b, n in ((0, 16), (1, 9))
    ]  # fmt: skip
    assert {name: int(value) for name, value in both.items()} == {
        name: int(alone[0][name] + alone[1][name]) for name in both
    }
    assert int(alone[1]["starts"]) == 5


def test_perfect_head_survives_to_the_end_of_the_answer(tiny, batch, monkeypatch):
    """With every prediction right, a chain from s has length min(depth, positions left)."""
    input_ids, features, loss_mask = batch
    loss_mask = torch.zeros_like(loss_mask)
    loss_mask[0, 4:10] = True
    module = make_module(tiny)

    class Right:
        def logits(self, rows, decoding):
            return torch.nn.functional.one_hot(input_ids[0, 6:12], 259).float()[: rows.shape[0]]

        def to_token_ids(self, indices):
            return indices

    counts = simulated_hits(module.draft, module.head, Right(), input_ids, features, loss_mask, WHOLE, 4)
    assert {name: int(value) for name, value in counts.items()} == {
        "starts": 6, "hits1": 6, "hits2": 6, "hits3": 6, "hits4": 6,
        "survived1": 6, "survived2": 5, "survived3": 4, "survived4": 3,
        "reached1": 6, "reached2": 5, "reached3": 4, "reached4": 3,
        "forced1": 6, "forced2": 5, "forced3": 4, "forced4": 3,
    }  # fmt: skip


def test_sequence_without_an_answer_has_no_chain(tiny, batch):
    input_ids, features, loss_mask = batch
    module = make_module(tiny)
    counts = simulated_hits(
        module.draft, module.head, module.vocabulary, input_ids, features, torch.zeros_like(loss_mask), WHOLE, 3
    )
    assert not any(int(value) for value in counts.values())
