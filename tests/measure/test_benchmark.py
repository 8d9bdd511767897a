"""run_benchmark with stub decoders: which decoder gets which prompts in which order, and what is written."""

import json
from dataclasses import dataclass

import pytest
import torch
from measure_toys import StubDecoder, question, toy_models

from hass_lightning.measure import read_records, run_benchmark, summarize
from hass_lightning.measure.benchmark_cells import plan_cells, turn_messages
from hass_lightning.types import Conversation, Message, Sampling

GREEDY, SAMPLED = Sampling(), Sampling(1.0, top_p=0.9)


def decoders(tree=None, seconds=0.5):
    return {
        "autoregressive": StubDecoder("autoregressive", head=False, acceptance="none"),
        "lookup": StubDecoder("prompt_lookup", head=False),
        "tree": StubDecoder("dynamic_tree", tree, seconds=seconds),
    }


def run(models=None, chosen=None, prompts=None, **options):
    prompts = prompts if prompts is not None else [question(i, f"q{i}") for i in range(3)]
    return run_benchmark(
        models or {"a": toy_models("A"), "b": toy_models("B")},
        chosen or decoders(),
        prompts,
        **({"max_new_tokens": 8, "num_warmup": 0} | options),
    )


def test_every_cell_runs_once_per_prompt_and_decoders_without_a_head_once():
    chosen = decoders()
    records = run(chosen=chosen, samplings=(GREEDY, SAMPLED))
    assert len(records) == 3 * 2 * (1 + 1 + 2)
    assert len({record.key for record in records}) == len(records)
    assert {(r.draft, r.decoder) for r in records} == {
        ("", "autoregressive"),
        ("", "lookup"),
        ("a", "tree"),
        ("b", "tree"),
    }
    assert {models.draft for models, *_ in chosen["tree"].asked} == {"A", "B"}
    assert [r.prompt_id for r in records] == sorted(r.prompt_id for r in records)
    rules = {(r.decoder, r.temperature): r.rule for r in records}
    assert rules["tree", 0.0] == "greedy"
    assert rules["tree", 1.0] == "deterministic"
    assert rules["autoregressive", 1.0] == "none"
    assert records[0].target == "toy/float32"


def orders(seed):
    log = []
    chosen = decoders()
    for name, decoder in chosen.items():
        decoder.answer = lambda prompt, models, name=name: log.append(name) or [1, 2]
    run({"a": toy_models()}, chosen, [question(i, "q") for i in range(30)], seed=seed)
    return [tuple(log[start : start + 3]) for start in range(0, 90, 3)]


def test_order_differs_between_prompts_and_repeats_with_the_seed():
    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    assert len(set(orders(0))) == 6  # all 3! orders occur within 30 prompts
    assert all(sorted(each) == sorted(decoders()) for each in orders(0))


def test_sampled_tokens_depend_only_on_prompt_turn_and_sampling():
    chosen = decoders()
    run(chosen=chosen, samplings=(SAMPLED,))
    seeds = [{seed for *_, seed in decoder.asked} for decoder in chosen.values()]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(seeds[0]) == 3


def test_second_turn_contains_the_autoregressive_answer_for_all_decoders():
    chosen = decoders(tree=lambda prompt, models: [ord("T")])
    prompts = [question(0, "one", "two")]
    records = run(chosen=chosen, prompts=prompts, samplings=(GREEDY, SAMPLED))
    assert {r.turn for r in records} == {0, 1}
    for decoder in chosen.values():
        assert {text for _, text, *_ in decoder.asked} == {"u:one|a:", "u:one|a:xyz|u:two|a:"}


def test_several_turns_need_the_baseline():
    chosen = decoders()
    del chosen["autoregressive"]
    with pytest.raises(ValueError, match="autoregressive"):
        run(chosen=chosen, prompts=[question(0, "one", "two")])
    rows = summarize(run(chosen=chosen))
    assert all(row["speedup"] is None and row["num_compared"] == 0 for row in rows)


def test_an_answered_conversation_is_asked_up_to_its_last_question():
    conversation = Conversation(
        "c", (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"),
              Message("assistant", "b"))
    )  # fmt: skip
    assert [[message.content for message in turn] for turn in turn_messages(conversation)] == [["s", "q", "a", "r"]]
    system = Conversation("c", (Message("system", "s"), Message("user", "q"), Message("user", "r")))
    assert [[message.content for message in turn] for turn in turn_messages(system)] == [["s", "q"], ["r"]]


def test_unusable_prompts_are_skipped_and_counted(caplog):
    prompts = [question("ok", "q"), question("empty", " \n"), question("none"), question("long", "q" * 2000)]
    records = run(prompts=prompts)
    assert {r.prompt_id for r in records} == {"ok"}
    assert "'an empty prompt': 2" in caplog.text
    assert "'turn 1 longer than the target's context': 1" in caplog.text.replace('"', "'")


def test_second_turn_that_is_too_long_keeps_the_first(caplog):
    records = run(prompts=[question("0", "q", "r" * 2000)])
    assert {r.turn for r in records} == {0}
    assert "turn 2" in caplog.text


def test_resuming_decodes_only_what_is_missing(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = run(records_path=path, samplings=(GREEDY, SAMPLED))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:30])  # killed while writing
    chosen, seen = decoders(), []
    again = run(chosen=chosen, records_path=path, samplings=(GREEDY, SAMPLED), on_record=seen.append)
    assert sum(len(decoder.asked) for decoder in chosen.values()) == len(lines) - 7 == len(seen)
    assert [r.key for r in again] == [r.key for r in whole]
    assert sorted(r.key[2:6] for r in read_records(path)) == sorted(r.key[2:6] for r in whole)
    chosen = decoders()
    run(chosen=chosen, records_path=path, samplings=(GREEDY, SAMPLED), num_warmup=1)
    assert not any(decoder.asked for decoder in chosen.values())  # not even a warm-up
    run(chosen=chosen, records_path=path, samplings=(GREEDY, SAMPLED), max_new_tokens=9)
    assert all(decoder.asked for decoder in chosen.values())  # another limit is a different measurement


def test_a_tree_of_another_size_is_another_measurement(tmp_path):
    path, models = tmp_path / "records.jsonl", {"a": toy_models()}

    @dataclass
    class Tree:
        num_nodes: int
        acceptance = "deterministic"
        name = "dynamic_tree"

        def check(self, models):
            if models.draft is None:
                raise ValueError("no head")

        def generate(self, *arguments):
            return StubDecoder("dynamic_tree").generate(*arguments)

    for nodes, num_lines in ((8, 3), (8, 3), (16, 6)):
        records = run(models, {"tree": Tree(nodes)}, records_path=path)
        assert [record.settings for record in records] == [{"num_nodes": nodes}] * 3
        assert len(read_records(path)) == num_lines


def test_resumed_second_turn_contains_the_stored_first_answer(tmp_path):
    path = tmp_path / "records.jsonl"
    prompts = [question(0, "one", "two")]
    run(prompts=prompts, records_path=path)
    lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["turn"] == 0]
    path.write_text("".join(lines))
    chosen = decoders()
    run(chosen=chosen, prompts=prompts, records_path=path)
    assert {text for decoder in chosen.values() for _, text, *_ in decoder.asked} == {"u:one|a:xyz|u:two|a:"}


def test_warm_up_is_short_and_not_recorded():
    chosen = decoders()
    records = run({"a": toy_models()}, chosen, max_new_tokens=100, num_warmup=2)
    assert len(records) == 9
    limits = [limit for _, _, limit, *_ in chosen["tree"].asked]
    assert limits == [16, 16, 100, 100, 100]


def test_time_outside_of_all_phases_is_bookkeeping():
    chosen = {"autoregressive": StubDecoder("autoregressive", head=False, seconds=-0.099)}  # sum: 1 ms
    wait = torch.randn(300, 300)
    chosen["autoregressive"].answer = lambda prompt, models: [(wait @ wait).shape[0] for _ in range(3)]
    record = run(chosen=chosen)[0]
    assert record.seconds["bookkeeping"] >= 0
    assert record.total_seconds >= 0.001


def test_greedy_answers_are_compared_and_differences_kept():
    """The tree of draft B differs at position 1, where the traced runs record the gap of the target's logits."""
    answer = lambda prompt, models: [ord(c) for c in ("xyz" if models.draft == "A" else "xQz")]  # noqa: E731
    records = run(chosen=decoders(answer), samplings=(GREEDY, SAMPLED))
    by_cell = {(r.draft, r.decoder, r.temperature): r for r in records if r.prompt_id == "0"}
    assert by_cell["", "autoregressive", 0.0].identical is None
    assert by_cell["", "lookup", 0.0].identical is True
    assert by_cell["a", "tree", 0.0].identical is True
    assert by_cell["a", "tree", 1.0].identical is None
    differing = by_cell["b", "tree", 0.0]
    assert differing.identical is False
    assert differing.difference == {
        "position": 1, "token": ord("Q"), "baseline_token": ord("y"), "gap": 1.5, "baseline_gap": 1.5
    }  # fmt: skip
    rows = {(row["draft"], row["decoder"], row["temperature"]): row for row in summarize(records)}
    assert (rows["b", "tree", 0.0]["num_identical"], rows["b", "tree", 0.0]["num_compared"]) == (0, 3)
    assert rows["b", "tree", 0.0]["largest_gap"] == 1.5
    assert (rows["a", "tree", 0.0]["num_identical"], rows["a", "tree", 0.0]["largest_gap"]) == (3, None)
    assert rows["a", "tree", 1.0]["num_identical"] is None


def test_checked_prompts_are_decoded_again_in_fp32(caplog):
    """In bf16 both trees differ; in fp32 only that of B does, which is a defect and is logged."""

    def answer(prompt, models):
        wrong = models.target.dtype == torch.bfloat16 or models.draft == "B"
        return [ord(c) for c in ("xQz" if wrong else "xyz")]

    low = {name: toy_models(name.upper(), torch.bfloat16) for name in "ab"}
    high = {name: toy_models(name.upper()) for name in "ab"}
    with pytest.raises(ValueError, match="fp32_models"):
        run(low, decoders(answer), checked_prompts=2)
    records = run(low, decoders(answer), checked_prompts=2, fp32_models=high)
    rows = {(row["draft"], row["decoder"]): row for row in summarize(records)}
    assert [rows[name, "tree"]["num_identical"] for name in "ab"] == [0, 0]
    assert [rows[name, "tree"]["num_checked"] for name in "ab"] == [2, 2]
    assert [rows[name, "tree"]["num_fp32_identical"] for name in "ab"] == [2, 0]
    assert rows["", "lookup"]["num_fp32_identical"] == 2
    assert "tree of draft 'b' is not lossless" in caplog.text
    with pytest.raises(ValueError, match="lacks the draft 'b'"):
        run(low, decoders(answer), checked_prompts=1, fp32_models={"a": high["a"]})


def test_unmeasurable_combinations_are_refused():
    with pytest.raises(ValueError, match="needs a draft head"):
        run({"a": toy_models(None)})
    with pytest.raises(ValueError, match="one target"):
        run({"a": toy_models(), "b": toy_models(name="other")})
    with pytest.raises(ValueError, match="several prompts with the id '1'"):
        run(prompts=[question(1, "a"), question(1, "b")])
    with pytest.raises(ValueError, match="at least one"):
        plan_cells({}, {}, [])


def test_summary_rows():
    records = run(chosen=decoders(seconds=0.45), prompts=[question(i, "q") for i in range(10)])
    row = next(row for row in summarize(records) if row["draft"] == "a")
    assert row["num_prompts"] == 10
    assert row["acceptance_length"] == row["acceptance_length_low"] == row["acceptance_length_high"] == 1.0
    assert row["speedup"] == pytest.approx(1.1 / 0.55, rel=0.01)
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["tokens_per_second"] == pytest.approx(3 / 0.55, rel=0.01)
    json.loads(json.dumps(summarize(records), allow_nan=False))
    alone = summarize(run(prompts=[question(0, "q")]))
    assert alone[-1]["acceptance_length_low"] is None
    json.dumps(alone, allow_nan=False)
