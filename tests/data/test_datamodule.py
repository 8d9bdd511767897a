"""Splits, batch order and noise depend only on (seed, epoch, index)."""

import random
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.order import BatchOrder, split_validation
from hass_lightning.types import Conversation, Message


def conversation(number, question, split="", answer="some answer"):
    return Conversation(str(number), (Message("user", question), Message("assistant", answer)), split=split)


def normal(question):
    return " ".join(question.lower().split())


def random_corpus(draw, labelled):
    questions = [f"Question {n}" for n in range(draw.randint(4, 12))]
    corpus = []
    for number in range(draw.randint(20, 60)):
        question = draw.choice(questions)
        question = draw.choice([question, question.upper(), f"  {question} ", question.replace(" ", "\n")])
        corpus.append(conversation(number, question, draw.choice(["train", "validation", ""]) if labelled else ""))
    return corpus


@pytest.mark.parametrize("labelled", [False, True])
def test_no_question_is_in_both_parts(labelled):
    for seed in range(200):
        draw = random.Random(seed)
        corpus, size = random_corpus(draw, labelled), draw.randint(1, 3)
        try:
            train, validation = split_validation(corpus, size)
        except ValueError:
            assert labelled  # every question may be labelled validation somewhere
            continue
        asked = [normal(c.question) for c in validation]
        assert not set(asked) & {normal(c.question) for c in train}
        assert len(asked) == len(set(asked)) <= size
        if not labelled:
            assert len(asked) == size
            assert len(train) == sum(normal(c.question) not in asked for c in corpus)


def test_the_split_depends_on_the_questions_and_not_on_their_order():
    corpus = [conversation(n, f"question {n}") for n in range(50)]
    shuffled = random.Random(0).sample(corpus, 50)
    first, second = split_validation(corpus, 10), split_validation(shuffled, 10)
    assert {c.id for c in first[1]} == {c.id for c in second[1]}
    grown = split_validation([*corpus, conversation(50, "one more")], 10)
    assert len({c.id for c in first[1]} & {c.id for c in grown[1]}) >= 9


def test_labels_of_the_data_win():
    corpus = [conversation(n, f"q {n}", "validation" if n % 3 == 0 else "train") for n in range(12)]
    train, validation = split_validation(corpus, 3)
    assert {c.split for c in train} == {"train"}
    assert [c.id for c in validation] == ["0", "3", "6"]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 5), (5, 9)])
def test_a_split_with_an_empty_part_names_the_key(count, size):
    with pytest.raises(ValueError, match=r"data\.num_validation"):
        split_validation([conversation(n, f"q {n}") for n in range(count)], size)


def order(num_batches=40, first=0, rank=0, world_size=1, batch_size=4, seed=0, count=37):
    lengths = [random.Random(n).randint(3, 300) for n in range(count)]
    return BatchOrder(lengths, batch_size, seed, num_batches, first, rank, world_size)


@pytest.mark.parametrize("first", [0, 1, 8, 9, 10, 17, 39, 40])
def test_a_resumed_order_is_the_tail_of_the_whole(first):
    assert list(order(first=first)) == list(order())[first:]
    assert len(order(first=first)) == 40  # Lightning counts the batches of the whole run


def test_each_epoch_takes_each_index_at_most_once_and_shuffles_anew():
    sampler = order(num_batches=90)
    assert sampler.batches_per_epoch == 9
    batches = list(sampler)
    epochs = [batches[start : start + 9] for start in range(0, 90, 9)]
    left_out = set()
    for number, epoch in enumerate(epochs):
        keys = [key for batch in epoch for key in batch]
        assert {epoch_of for epoch_of, _ in keys} == {number}
        assert len(keys) == len(set(keys)) == 36
        left_out |= set(range(37)) - {index for _, index in keys}
    assert len(left_out) > 3  # not always the same one
    assert epochs[0] != [[(0, index) for _, index in batch] for batch in epochs[1]]


def test_the_seed_decides():
    assert list(order(seed=1)) != list(order(seed=2))
    assert list(order(seed=1)) == list(order(seed=1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_same_global_batches(world_size):
    whole = list(order(batch_size=4))
    parts = [list(order(batch_size=4 // world_size, rank=r, world_size=world_size)) for r in range(world_size)]
    for number, batch in enumerate(whole):
        shared = [key for part in parts for key in part[number]]
        assert sorted(shared) == sorted(batch)
        assert {len(part[number]) for part in parts} == {4 // world_size}


def test_similar_lengths_are_gathered():
    sampler = order(count=200, batch_size=8)
    spread = [max(sampler.lengths[i] for i in b) - min(sampler.lengths[i] for i in b) for b in sampler.epoch(0)]
    assert sum(spread) / len(spread) < 60  # 300 / 16 per batch within a bucket, and the last bucket is smaller


def test_too_few_conversations_name_the_key():
    with pytest.raises(ValueError, match=r"37 training conversations.*40.*data\.batch_size"):
        order(batch_size=20, world_size=2)


class Store:
    """Three sequences of lengths 2, 5, 3 without a file."""

    ids = ("a", "b", "c")

    def __len__(self):
        return 3

    def length(self, index):
        return (2, 5, 3)[index]

    def read(self, index):
        length, generator = self.length(index), torch.Generator().manual_seed(index)
        return {
            "input_ids": torch.randint(1, 9, (length,), generator=generator),
            "target_ids": torch.randint(1, 9, (length,), generator=generator),
            "loss_mask": torch.ones(length, dtype=torch.bool),
            "features": torch.randn(length, 4, generator=generator),
        }


def test_noise_depends_on_seed_epoch_and_index_alone():
    dataset = FeatureDataset(Store(), noise=0.1, seed=3)
    torch.manual_seed(0)
    first = dataset[(2, 1)]["inputs"]
    torch.manual_seed(1)
    dataset[(0, 0)]
    assert torch.equal(first, FeatureDataset(Store(), noise=0.1, seed=3)[(2, 1)]["inputs"])
    others = [FeatureDataset(Store(), 0.1, 4)[(2, 1)], dataset[(1, 1)]]
    assert all(not torch.equal(first, row["inputs"]) for row in others)
    clean = Store().read(1)["features"]
    assert torch.equal(dataset[(2, 1)]["features"], clean)
    noise = torch.cat([(FeatureDataset(Store(), 0.1, s)[(0, 1)]["inputs"] - clean).flatten() for s in range(200)])
    assert noise.abs().max() <= 0.1 + 1e-6
    assert abs(float(noise.mean())) < 0.005
    assert float(noise.std()) == pytest.approx(0.2 / 12**0.5, rel=0.05)


def test_without_noise_the_features_are_not_there_twice():
    """A copy would be pinned and copied to a GPU a second time."""
    rows = [FeatureDataset(Store())[(0, index)] for index in range(3)]
    assert collate(rows)[1] is None
    row = FeatureDataset(Store(), 0.1)[(0, 1)]
    assert collate([rows[0], row])[1] is not None


def test_collate_pads_on_the_right_and_marks_no_padding():
    rows = [FeatureDataset(Store(), 0.1)[(0, index)] for index in range(3)]
    batch, inputs = collate(rows)
    assert batch.lengths.tolist() == [2, 5, 3]
    assert batch.ids == ["a", "b", "c"]
    for number, row in enumerate(rows):
        length = int(batch.lengths[number])
        for name in ("input_ids", "loss_mask", "features", "target_ids"):
            assert torch.equal(getattr(batch, name)[number, :length], row[name])
        assert torch.equal(inputs[number, :length], row["inputs"])
        assert not batch.loss_mask[number, length:].any()
        assert not batch.features[number, length:].any()
        assert (batch.target_ids[number, length:] == -1).all()


@dataclass(frozen=True)
class Corpus:
    """Conversations of various lengths."""

    count: int = 23

    def load(self, target):
        return [conversation(n, f"question {n}", answer="word " * (1 + n % 7)) for n in range(self.count)]


def module(target, tmp_path, **options):
    settings = {"num_validation": 5, "batch_size": 4, "cache_dir": str(tmp_path)} | options
    return FeatureDataModule(Corpus(), target, **settings)


def trainer(step=0, accumulate=1, rank=0, world_size=1):
    return SimpleNamespace(
        global_step=step, accumulate_grad_batches=accumulate, global_rank=rank, world_size=world_size
    )


def test_one_process_and_two_see_the_same_sequences(tiny, tmp_path):
    whole = module(tiny, tmp_path)
    whole.trainer, whole.num_batches = trainer(), 6
    halves = [module(tiny, tmp_path, batch_size=2) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.trainer, half.num_batches = trainer(rank=rank, world_size=2), 6
    batches = [batch.ids for batch, _ in whole.train_dataloader()]
    parts = zip(*[[batch.ids for batch, _ in half.train_dataloader()] for half in halves], strict=True)
    assert len(batches) == 6
    assert [sorted(ids) for ids in batches] == [sorted(one + other) for one, other in parts]
    validation = [[batch for batch, _ in half.val_dataloader()] for half in halves]
    assert {len(batches) for batches in validation} == {2}  # under ZeRO-3 every forward is a step of all
    drawn = [batch for half in validation for batch in half]
    seen = [id for batch in drawn for id, mask in zip(batch.ids, batch.loss_mask, strict=True) if mask.any()]
    assert sum(len(batch.ids) for batch in drawn) == 6  # one is padding and is not counted
    assert sorted(seen) == sorted(id for batch, _ in whole.val_dataloader() for id in batch.ids)
    assert len(seen) == 5


def test_a_resumed_loader_starts_at_the_next_step(tiny, tmp_path):
    data = module(tiny, tmp_path, noise=0.1)
    data.num_batches = 12
    data.trainer = trainer()
    whole = [(batch.ids, inputs) for batch, inputs in data.train_dataloader()]
    data.trainer = trainer(step=2, accumulate=3)
    tail = [(batch.ids, inputs) for batch, inputs in data.train_dataloader()]
    assert [ids for ids, _ in tail] == [ids for ids, _ in whole[6:]]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(tail, whole[6:], strict=True))


def test_loader_processes_change_nothing(tiny, tmp_path):
    batches = []
    for workers in (0, 1):
        data = module(tiny, tmp_path, noise=0.1, num_workers=workers)
        data.num_batches, data.trainer = 4, trainer()
        batches.append([inputs for _, inputs in data.train_dataloader()])
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_most_frequent_tokens_cover_what_is_drafted(tiny, tmp_path):
    data = module(tiny, tmp_path)
    ids, coverage = data.most_frequent_tokens(6)
    letters = set(tiny.tokenizer("word ", add_special_tokens=False)["input_ids"])
    assert set(ids.tolist()) == letters | tiny.eos_token_ids
    assert ids.tolist() == sorted(ids.tolist())
    assert coverage == 1.0
    assert data.most_frequent_tokens(3)[1] < 1
    rare = torch.tensor([100, 101])
    assert set(rare.tolist()) < set(data.most_frequent_tokens(6, kept=rare)[0].tolist())
    assert set(data.most_frequent_tokens(4, kept=rare)[0].tolist()) - {100, 101} < set(ids.tolist())
    assert torch.equal(data.most_frequent_tokens(1, kept=rare)[0], data.most_frequent_tokens(1)[0])  # it does not fit
    for size in (0, 10**6):
        with pytest.raises(ValueError, match=r"model\.draft\.vocab_size"):
            data.most_frequent_tokens(size)


def test_fractions_are_nested_and_read_the_same_features(tiny, tmp_path):
    parts = []
    for fraction in (0.125, 0.25, 0.5, 1.0):
        data = module(tiny, tmp_path, fraction=fraction)
        store, _ = data.stores()
        assert list(store.ids) == [sequence.id for sequence in data.tokens()[0]]
        rows = [store.read(index)["input_ids"] for index in range(len(store))]
        assert all(torch.equal(row, sequence.input_ids) for row, sequence in zip(rows, data.tokens()[0], strict=True))
        parts.append(set(store.ids))
    assert [len(part) for part in parts] == [2, 4, 9, 18]
    assert all(smaller < larger for smaller, larger in pairwise(parts))
    assert len(list((tmp_path / "features").iterdir())) == 2  # one set of training features, one of validation


@pytest.mark.parametrize(
    "option",
    [
        {"fraction": 0.0}, {"fraction": 1.5}, {"batch_size": 0}, {"max_length": 1}, {"num_validation": 0},
        {"noise": -0.1},
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(tiny, tmp_path, option):
    with pytest.raises(ValueError, match=f"data.{next(iter(option))}"):
        module(tiny, tmp_path, **option)


def test_validation_conversations_are_those_with_tokens(tiny, tmp_path):
    data = module(tiny, tmp_path, max_length=44)
    train, validation = data.tokens()
    assert len(train) + len(validation) < 23
    assert [c.id for c in data.validation_conversations] == [tokens.id for tokens in validation]


def test_online_features_are_the_cached_ones_and_nothing_is_written(tiny, tmp_path):
    cached, online = module(tiny, tmp_path / "cached"), module(tiny, tmp_path / "online", features="online")
    for data in (cached, online):
        data.num_batches, data.trainer = 5, trainer()
    for name in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(cached, name)(), getattr(online, name)(), strict=True))
        assert pairs
        for (ours, _), (expected, _) in pairs:
            assert ours.ids == expected.ids
            for field in ("input_ids", "loss_mask", "target_ids", "lengths"):
                assert torch.equal(getattr(ours, field), getattr(expected, field))
            torch.testing.assert_close(ours.features, expected.features, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "online").exists()
    assert online.stores()[0].ids == cached.stores()[0].ids


@pytest.mark.parametrize("option", [{"num_workers": 1}, {"eight_bit_cache": True}])
def test_online_features_refuse_what_they_cannot_do(tiny, tmp_path, option):
    with pytest.raises(ValueError, match=r"data\.features=online.*data\." + next(iter(option))):
        module(tiny, tmp_path, features="online", **option)


def test_features_from_nowhere_name_the_key(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"data\.features=disk"):
        module(tiny, tmp_path, features="disk")
