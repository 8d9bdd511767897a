"""The target writes a corpus: greedy as one by one, sampling by index alone, resumable, seeded, with a manifest."""

import hashlib
import json
import random
import threading

import pytest
import torch

from hass_lightning.data.generate import Request, SelfDistillation, write_texts
from hass_lightning.data.order import split_validation
from hass_lightning.data.prompts import parse_all, read_json_lines


def requests(temperature, count=9, seed=0):
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 250) for _ in range(draw.randint(1, 30))] for _ in range(count)]
    return [Request(index, prompt, temperature) for index, prompt in enumerate(prompts)]


def written(target, wanted, batch_size, limit=12, seed=0, top_k=None):
    results = list(write_texts(target, wanted, limit, seed, batch_size, "stage", top_k))
    assert len(results) == len(wanted)
    return {request.index: (ids, ended) for request, ids, ended in results}


def one_by_one(target, prompt, limit):
    """The plain greedy loop."""
    cache, ids, answer = target.new_cache(1, len(prompt) + limit), torch.tensor([prompt]), []
    for _ in range(limit):
        features = target.forward(ids, cache)
        cache.advance(ids.shape[1])
        token = int(target.head.logits(features[0, -1]).argmax())
        if token in target.eos_token_ids:
            return answer, True
        answer.append(token)
        ids = torch.tensor([[token]])
    return answer, False


@pytest.fixture(scope="module")
def ending(tiny):
    """The tiny target with many tokens that end an answer, so that rows finish at different times."""
    target = tiny.in_dtype(torch.float32)
    target.eos_token_ids = frozenset(range(0, 259, 13)) | tiny.eos_token_ids
    return target


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 64])
def test_greedy_batches_equal_a_plain_loop(ending, batch_size):
    wanted = requests(0.0)
    expected = {request.index: one_by_one(ending, request.prompt, 12) for request in wanted}
    assert written(ending, wanted, batch_size) == expected
    assert 0 < sum(ended for _, ended in expected.values()) < len(wanted)
    assert len({len(ids) for ids, _ in expected.values()}) > 2


@pytest.mark.parametrize("limit", [1, 2])
def test_the_shortest_answers_too(ending, limit):
    wanted = requests(0.0, count=5, seed=1)
    expected = {request.index: one_by_one(ending, request.prompt, limit) for request in wanted}
    assert written(ending, wanted, 2, limit) == expected


@pytest.mark.parametrize("top_k", [None, 20])
def test_samples_depend_on_seed_and_index_not_on_the_batch(ending, top_k):
    wanted = requests(1.0)
    first = written(ending, wanted, 1, top_k=top_k)
    for batch_size in (2, 5, 64):
        assert written(ending, wanted, batch_size, top_k=top_k) == first
    assert written(ending, wanted[::-1], 3, top_k=top_k) == first
    part = written(ending, wanted[4:], 3, top_k=top_k)
    assert part == {index: first[index] for index in part}
    assert written(ending, wanted, 5, seed=1, top_k=top_k) != first


def test_greedy_and_sampled_requests_share_a_batch(ending):
    mixed = [Request(request.index, request.prompt, float(request.index % 2)) for request in requests(0.0)]
    apart = written(ending, mixed, 1)
    assert written(ending, mixed, 4) == apart


def test_samples_follow_the_distribution(tiny):
    prompt = [5, 6, 7]
    probs = tiny.head.logits(tiny.encode(torch.tensor([prompt]))[0, -1]).softmax(-1)
    count, temperature = 4000, 1.0
    wanted = [Request(index, prompt, temperature) for index in range(count)]
    seen = torch.zeros(tiny.head.vocab_size)
    for ids, _ in written(tiny, wanted, 512, limit=1).values():
        seen[ids[0] if ids else min(tiny.eos_token_ids)] += 1
    likely = probs > 0.01
    deviation = (seen / count - probs)[likely] / (probs * (1 - probs) / count).sqrt()[likely]
    assert deviation.abs().max() < 4.5
    top = written(tiny, wanted[:300], 300, limit=1, top_k=2)
    best = set(probs.topk(2).indices.tolist())
    assert {ids[0] for ids, _ in top.values() if ids} <= best


def test_nothing_to_write_is_nothing(tiny):
    assert list(write_texts(tiny, [], 5, 0, 4)) == []


# --- a corpus --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "num_questions": 14, "num_validation": 4, "question_max_tokens": 8, "answer_max_tokens": 10,
    "answer_temperatures": (0.0, 1.0), "keep_unfinished_questions": True, "batch_size": 4,
}  # fmt: skip


def source(folder, **options):
    return SelfDistillation(str(folder), **SETTINGS | options)


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    """A finished corpus that nothing interrupted."""
    folder = tmp_path_factory.mktemp("corpus") / "whole"
    source(folder).write(tiny)
    return folder


def test_the_corpus_holds_distinct_questions_and_a_manifest(corpus, tiny):
    conversations = parse_all(read_json_lines(corpus / "corpus.jsonl"), "corpus")
    questions = [c.question for c in conversations]
    assert len(questions) == len({" ".join(q.lower().split()) for q in questions}) == 14
    assert [c.split for c in conversations].count("validation") == 4
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["counts"]["train"] == 10
    assert manifest["counts"]["validation"] == 4
    assert manifest["sha256"] == hashlib.sha256((corpus / "corpus.jsonl").read_bytes()).hexdigest()
    assert manifest["settings"]["fingerprint"] == tiny.fingerprint
    assert manifest["settings"]["answer_temperatures"] == [0.0, 1.0]
    records = [json.loads(line) for line in (corpus / "corpus.jsonl").open()]
    assert {r["temperature"] for r in records if r["split"] == "validation"} == {0.0}
    assert {r["temperature"] for r in records if r["split"] == "train"} == {0.0, 1.0}
    train, validation = split_validation(conversations, 4)
    assert not {c.question for c in train} & {c.question for c in validation}


def test_a_finished_corpus_is_read_and_not_written(corpus, tiny, monkeypatch):
    monkeypatch.setattr("hass_lightning.data.generate.write_texts", None)
    assert len(source(corpus).load(tiny)) == 14


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_batch_size_changes_nothing(corpus, tiny, tmp_path, batch_size):
    source(tmp_path / "again", batch_size=batch_size).write(tiny)
    assert (tmp_path / "again" / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()


def interrupted(corpus, folder, name, share, cut):
    """The folder as a kill leaves it while `name` is written: a random part of the lines, the last one cut."""
    folder.mkdir()
    shutil_names = ["settings.json", "questions.jsonl"] + (["answers.jsonl"] if name == "answers.jsonl" else [])
    for each in shutil_names:
        (folder / each).write_bytes((corpus / each).read_bytes())
    lines = (corpus / name).read_text().splitlines(keepends=True)
    random.Random(share).shuffle(lines)
    kept = "".join(lines[: int(share * len(lines))])
    (folder / name).write_text(kept[: len(kept) - cut] if cut else kept)


@pytest.mark.parametrize("name", ["questions.jsonl", "answers.jsonl"])
@pytest.mark.parametrize(
    ("share", "cut"), [(0.3, 7), (0.8, 30), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 0), (1, 3)])]
)
def test_a_killed_run_started_again_gives_the_same_corpus(corpus, tiny, tmp_path, name, share, cut):
    folder = tmp_path / "again"
    interrupted(corpus, folder, name, share, cut)
    source(folder).write(tiny)
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()
    lines = [json.loads(line) for line in (folder / name).open()]
    assert len(lines) == len({line["index"] for line in lines})


def test_a_kill_while_the_corpus_is_put_together(corpus, tiny, tmp_path):
    folder = tmp_path / "again"
    interrupted(corpus, folder, "answers.jsonl", 1, 0)
    (folder / "corpus.jsonl").write_text("half a li")
    source(folder).write(tiny)
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()


def test_a_corpus_grows_and_shrinks_and_keeps_its_beginning(corpus, tiny, tmp_path):
    folder = tmp_path / "growing"
    for count in (8, 14, 8, 14):
        source(folder, num_questions=count).write(tiny)
        lines = (folder / "corpus.jsonl").read_bytes().splitlines()
        assert lines == (corpus / "corpus.jsonl").read_bytes().splitlines()[:count]


@pytest.mark.parametrize(
    "option", [{"answer_max_tokens": 11}, {"seed": 1}, {"question_temperature": 0.5}, {"num_validation": 5}]
)
def test_other_settings_in_the_same_folder_are_refused(corpus, tiny, option):
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    with pytest.raises(ValueError, match=rf"another {next(iter(option))}.*data\.source\.output_dir"):
        source(corpus, **option).write(tiny)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before


def test_another_target_in_the_same_folder_is_refused(corpus, tiny):
    other = tiny.in_dtype(torch.float32)
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="another fingerprint"):
        source(corpus).write(other)


def test_a_target_that_repeats_itself_is_an_error_with_a_cure(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"repeats itself: 1 distinct.*question_temperature"):
        source(tmp_path / "x", question_temperature=0.0, num_questions=6).write(tiny)


def test_more_validation_than_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_questions=4 must exceed num_validation=4"):
        source(tmp_path, num_questions=4)


def test_two_at_once_write_it_once(corpus, tiny, tmp_path):
    folder, paths = tmp_path / "shared", []
    threads = [threading.Thread(target=lambda: paths.append(source(folder).write(tiny))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 14
