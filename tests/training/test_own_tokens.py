"""On-policy alignment steps against drafting one token after the other and reading each text from its start."""

from copy import deepcopy

import pytest
import torch
from training_toys import make_data, make_module, make_small_trainer

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.draft import Alignment, unroll
from hass_lightning.training.heads import HeadsModule
from hass_lightning.training.own_tokens import OwnTokens, own_token_loss


def own_module(target, depth, **options):
    module = make_module(target, depth, **options)
    module.planned_alignment = module.alignment = Alignment(depth, inputs="own_tokens", own_share=1.0)
    return module


def first_batch(target, folder, count=4):
    data = make_data(target, folder)
    data.prepare_data()
    dataset = FeatureDataset(data.stores()[0])
    return collate([dataset[index] for index in range(count)])


def drafted(module, prepared, number, root, steps):
    """Draft `steps` tokens after a root, one at a time; return the tokens that were read and the predicted features."""
    draft, ids = module.draft, prepared.batch.input_ids[number]
    cache = draft.new_cache(1, root + 1 + steps)
    embeddings = module.head.embed(ids[1 : root + 2])[None]
    predicted = draft(embeddings, prepared.inputs[number : number + 1, : root + 1], cache)[:, -1:]
    cache.advance(root + 1)
    tokens, features = [], [predicted[0, 0]]
    for _ in range(steps - 1):
        best = module.draft.logits(predicted, module.vocabulary, decoding=False).argmax(-1)
        tokens.append(int(module.vocabulary.to_token_ids(best)))
        predicted = draft(module.head.embed(torch.tensor([[tokens[-1]]])), predicted, cache)
        cache.advance(1)
        features.append(predicted[0, 0])
    return tokens, features


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_equals_drafting_token_by_token(tiny, tmp_path, depth, pruned):
    token_ids = torch.arange(0, tiny.head.vocab_size, 2) if pruned else None
    module = own_module(tiny, depth, token_ids=token_ids)
    prepared = module.prepare(*first_batch(tiny, tmp_path, count=2))
    own = OwnTokens(module, prepared)
    inputs = (prepared.embeddings, prepared.inputs, module.alignment, prepared.mask)
    with torch.no_grad():
        steps = list(unroll(module.draft, *inputs, next_embeddings=own.next_embeddings))
    labels = own.labels(tiny)
    changed, whole = 0, 0
    for number, row in prepared.mask.nonzero().tolist():
        for step in range(depth):
            root, ids = row - step, prepared.batch.input_ids[number]
            if root < 0 or not prepared.mask[number, root]:
                continue
            with torch.no_grad():
                tokens, features = drafted(module, prepared, number, root, step + 1)
            read = [int(own.read[later][number, root + later]) for later in range(1, step + 1)]
            assert read == tokens
            torch.testing.assert_close(steps[step][number, row], features[step], rtol=1e-4, atol=1e-5)
            text = torch.cat([ids[: root + 2], torch.tensor(tokens, dtype=ids.dtype)])
            states = tiny.encode(text[None])[0, -1]
            torch.testing.assert_close(labels[step][0][number, row], states, rtol=1e-4, atol=1e-4)
            best = tiny.head.logits(states[None]).argmax(-1)
            assert labels[step][1][number, row] == module.vocabulary.to_indices(best)
            changed += tokens != ids[root + 2 : row + 2].tolist()
            whole += 1
    assert 0 < changed < whole  # steps that left the text, and others


def test_loss_is_the_sum_over_steps_of_the_loss_with_their_own_labels(tiny, tmp_path):
    module = own_module(tiny, 3)
    prepared = module.prepare(*first_batch(tiny, tmp_path))
    output = own_token_loss(module, tiny, prepared, 7.0)
    own = OwnTokens(module, prepared)
    inputs = (prepared.embeddings, prepared.inputs, module.alignment, prepared.mask)
    steps = list(unroll(module.draft, *inputs, next_embeddings=own.next_embeddings))
    expected, hits = torch.zeros(()), []
    for step, (features, wanted) in zip(steps, own.labels(tiny), strict=True):
        mine, theirs = step[prepared.mask], features[prepared.mask]
        p, q = (torch.log_softmax(tiny.head.logits(each), -1) for each in (theirs, mine))
        top = p.exp().topk(10, dim=-1)
        expected = expected + torch.nn.functional.smooth_l1_loss(mine, theirs, reduction="none").mean(-1).sum()
        expected = expected - 0.1 * (p.exp() * q).sum() - (top.values * q.gather(-1, top.indices)).sum()
        hits.append(q.argmax(-1) == wanted[prepared.mask])
    torch.testing.assert_close(output.total, expected / 7, rtol=1e-4, atol=1e-5)
    assert torch.equal(output.hits, torch.stack(hits))
    parameters = list(module.draft.parameters())
    mine, theirs = torch.autograd.grad(output.total, parameters), torch.autograd.grad(expected / 7, parameters)
    for gradient, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-6)
    assert {f"{name}/step{step}" for name in module.loss.terms for step in (1, 2, 3)} == set(output.values)


def test_many_branches_are_read_in_parts(tiny, tmp_path, monkeypatch):
    module = own_module(tiny, 4)
    prepared = module.prepare(*first_batch(tiny, tmp_path))
    whole = own_token_loss(module, tiny, prepared, 1.0).total
    monkeypatch.setattr("hass_lightning.training.own_tokens.BRANCH_TOKENS", 6)
    torch.testing.assert_close(own_token_loss(module, tiny, prepared, 1.0).total, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("share", "steps"), [(1.0, [0, 1, 2, 3]), (0.5, [1, 3]), (0.25, [3])])
def test_share_of_the_steps(share, steps):
    alignment = Alignment(3, inputs="own_tokens", own_share=share)
    assert [step for step in range(4) if alignment.reads_own_tokens(step)] == steps
    assert not any(Alignment(3, own_share=share).reads_own_tokens(step) for step in range(4))


def test_trains_on_its_own_tokens_in_the_steps_of_the_share(tiny, tmp_path):
    weights = {}
    for inputs in ("given", "own_tokens"):
        for last in (1, 2):
            module = make_module(tiny)
            module.planned_alignment = Alignment(3, inputs=inputs, own_share=0.5)
            data = make_data(tiny, tmp_path)
            make_small_trainer(data, tmp_path / inputs / str(last), max_steps=last, max_epochs=None).fit(module, data)
            weights[inputs, last] = deepcopy(module.draft.state_dict())
    same = {
        last: all(torch.equal(value, weights["own_tokens", last][key]) for key, value in weights["given", last].items())
        for last in (1, 2)
    }
    assert not same[2]  # its second step reads other tokens


@pytest.mark.parametrize(
    ("options", "key"),
    [({"inputs": "own"}, "inputs=own"), ({"own_share": 0}, "own_share=0"),
     ({"inputs": "own_tokens", "alive": 3}, "alive=null"), ({"inputs": "own_tokens", "edge": "drop"}, "edge=keep")],
)  # fmt: skip
def test_values_that_do_not_fit(options, key):
    with pytest.raises(ValueError, match=key):
        Alignment(3, **options)


def test_not_for_several_heads(tiny):
    with pytest.raises(ValueError, match=r"heads\.mine\.alignment\.inputs=own_tokens"):
        HeadsModule({"mine": own_module(tiny, 3)})
