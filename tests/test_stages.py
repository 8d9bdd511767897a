"""Runs that end early, and runs that start from the head of another run, by their commands."""

import json
from pathlib import Path

from hass_lightning.draft import load_draft
from hass_lightning.draft.checkpoint import save_token_ids, tensor_hash
from hass_lightning.report.curves import read_curves
from test_overnight import SHORT


def result_of(done):
    assert done.code == 0, done.err
    return json.loads(done.out.strip().splitlines()[-1])


def test_early_stopping_ends_a_poor_run_at_its_first_validation(call_command):
    words = (*SHORT, "trainer.max_steps=4", "trainer.val_check_interval=1")
    stop = ("+callbacks@callbacks.early_stopping=early_stopping", "callbacks.early_stopping.divergence_threshold=6.1")
    curves = read_curves(Path(result_of(call_command("train", *words, *stop))["run_dir"]))
    assert len(curves["val/acceptance_length"]) == len(curves["train/loss"]) == 1  # at depth 5, τ cannot reach 6.1


def test_a_second_stage_starts_with_the_head_and_vocabulary_of_the_first(call_command):
    words = (*SHORT, "trainer.max_steps=2", "trainer.val_check_interval=2", "model.draft.vocab_size=40")
    first = Path(result_of(call_command("train", *words))["run_dir"])
    vocabulary = load_draft(first).token_ids
    unused = next(token for token in range(1000) if token not in vocabulary)
    vocabulary[7] = unused  # instead of a frequent one
    save_token_ids(first / "draft", vocabulary)
    done = call_command("train", *words, f"init_from={first}", "model.optimizer.lr=1e-4")
    second = Path(result_of(done)["run_dir"])
    assert f"the head is initialized from {first}" in done.out
    assert load_draft(second).token_ids.tolist() == sorted(vocabulary.tolist())
    starts = [json.loads((run / "start.json").read_text()) for run in (first, second)]
    head = load_draft(first).draft.state_dict()
    assert starts[1]["tensors"] == {name: tensor_hash(value) for name, value in head.items()} != starts[0]["tensors"]
    assert starts[1]["features"] == starts[0]["features"]
