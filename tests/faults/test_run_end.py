"""The end of a run is safe: an error before the first step, or a saved head."""

import json
import shutil
from pathlib import Path

import pytest

from hass_lightning.data.order import with_distinct_ids
from hass_lightning.draft import load_draft
from hass_lightning.training.callbacks import DecodingBenchmark
from hass_lightning.types import Conversation, Message

NO_VALIDATION = {
    "no validation batches": ("trainer.limit_val_batches=0",),
    "no callback that chooses": ("callbacks.best_draft=null",),
    "neither": ("trainer.limit_val_batches=0", "callbacks.best_draft=null"),
    "early stopping without a validation": (
        "trainer.limit_val_batches=0", "+callbacks@callbacks.early_stopping=early_stopping",
    ),
}  # fmt: skip


@pytest.mark.parametrize("overrides", NO_VALIDATION.values(), ids=NO_VALIDATION)
def test_run_without_a_selected_head_saves_the_last_one_with_a_warning(train, overrides):
    done = train(*overrides)
    assert done.code == 0, done.err
    notes = load_draft(done.result["run_dir"]).notes
    assert (notes["step"], notes["chosen_by"]) == (4, "none")
    assert "draft/ contains the last one, of step 4" in done.out


def test_run_without_time_saves_the_initial_head(train):
    done = train("compute.seconds=0")
    assert done.code == 0, done.err
    assert load_draft(done.result["run_dir"]).notes["step"] == 0
    assert done.result["simulated_acceptance_length"] >= 1


def test_selected_head_takes_precedence_over_the_last_one(train):
    notes = load_draft(train().result["run_dir"]).notes
    assert "chosen_by" not in notes
    assert notes["val/acceptance_length"] >= 1


@pytest.mark.parametrize("callback", ["best_draft", "best_checkpoint"])
def test_unknown_metric_is_refused_before_features_and_steps(train, callback, monkeypatch):
    from hass_lightning.data.datamodule import FeatureDataModule

    monkeypatch.setattr(FeatureDataModule, "stores", lambda self: pytest.fail("it went on"))
    done = train(f"callbacks.{callback}.monitor=val/acceptence_length")
    assert done.code == 1
    assert "val/acceptence_length" in done.error and "val/acceptance_length" in done.error
    assert f"callbacks.{callback}.monitor" in done.error


def test_every_metric_that_a_run_logs_can_be_monitored(train, monkeypatch):
    from hass_lightning.commands import train as command

    seen, original = [], command.check_monitors
    monkeypatch.setattr(
        command, "check_monitors", lambda callbacks, module: seen.append(module) or original({}, module)
    )
    run = Path(train("callbacks.throughput=null").result["run_dir"])
    header = set((run / "csv" / "metrics.csv").read_text().splitlines()[0].split(","))
    logged = {name for name in header if name.startswith(("val/", "train/"))}
    assert logged - seen[0].metric_names() == set()
    assert "val/acceptance_length" in logged


def test_better_score_of_another_run_does_not_prevent_saving(train):
    first = Path(train().result["run_dir"])
    file = first / "checkpoints" / "last.ckpt"
    import torch

    content = torch.load(file, weights_only=True)
    (best,) = [state for name, state in content["callbacks"].items() if name.startswith("SaveBestDraft")]
    best["best"] = 99.0
    torch.save(content, file)
    more = train("name=more", f"ckpt_path={file}", "trainer.max_steps=6")
    assert more.code == 0, more.err
    assert load_draft(more.result["run_dir"]).notes["step"] == 6


def test_finished_run_without_a_head_gets_one(train):
    run = Path(train().result["run_dir"])
    assert (run / "trained").exists()
    shutil.rmtree(run / "draft")
    (run / "metrics.json").unlink()
    again = train()
    assert again.code == 0, again.err
    assert load_draft(run).notes["step"] == 4


def test_the_end_is_rehearsed_before_the_first_step(train, monkeypatch, tmp_path):
    """A decoder that would fail after hours fails before the first step, and leaves no temporary folder."""
    original = DecodingBenchmark.measure

    def measure(self, target, saved, conversations, records_path=None, check=True):
        assert saved.notes["step"] == 0 and self.max_new_tokens <= 8 and len(conversations) == 1
        original(self, target, saved, conversations, records_path, check)
        raise ValueError("decoding.depth=0: nothing is drafted.")

    monkeypatch.setattr(DecodingBenchmark, "measure", measure)
    from omegaconf import OmegaConf

    from hass_lightning.runs.config import config_folder

    node = OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / "callbacks" / "default.yaml"))["decoding"]
    words = ",".join(f"{key}: {value}" for key, value in node.items())
    done = train(f"callbacks.decoding={{{words}}}")
    assert done.code == 1
    assert "decoding.depth=0" in done.error and "rehearsal" in done.out
    (run,) = (tmp_path / "runs").glob("smoke*")
    assert not list(run.glob(".rehearsal*")) and not (run / "checkpoints").exists()


def conversation(name, text):
    return Conversation(name, (Message("user", text), Message("assistant", "yes")))


def test_repeated_ids_are_made_distinct():
    same = [conversation("None", "a"), conversation("None", "b"), conversation("7", "c"), conversation("None", "d")]
    assert [each.id for each in with_distinct_ids(same)] == ["None", "None#2", "7", "None#3"]


def test_rows_with_one_id_are_trained_and_measured(call_command, train, corpus_folder, tmp_path):
    train()  # writes the corpus
    rows = [json.loads(line) for line in (corpus_folder / "corpus.jsonl").read_text().splitlines()]
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row | {"id": "same"}) + "\n" for row in rows))
    words = ("data=jsonl", f"data.source.path={file}", "data.num_validation=8", "data.batch_size=4")
    few = ("callbacks.decoding.num_prompts=3", "callbacks.decoding.max_new_tokens=8", "trainer.max_steps=2")
    done = call_command("train", "experiment=smoke", "logger=csv", *words, *few)
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["num_prompts"] == 3
