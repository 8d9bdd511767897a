"""Alerts, axes logged with validations, a row of the W&B table. The .wandb file itself: test_wandb_logging.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hass_lightning.measure.record import Record
from hass_lightning.runs.names import run_label
from hass_lightning.training import wandb_logging, watch
from hass_lightning.training.wandb_logging import COLUMNS, depth_rows, prompt_rows
from hass_lightning.training.watch import Watch


class FakeRun:
    def __init__(self):
        self.alerts, self.metrics = [], {}

    def alert(self, **values):
        self.alerts.append(values)

    def define_metric(self, name, **values):
        self.metrics[name] = values


@pytest.fixture
def run(monkeypatch):
    fake = FakeRun()
    monkeypatch.setattr(wandb_logging, "wandb_runs", lambda loggers: [fake])
    return fake


def validated(callback, acceptance, loss, **more):
    metrics = {"val/acceptance_length": acceptance, "val/loss": loss}
    trainer = SimpleNamespace(
        callback_metrics=metrics, sanity_checking=False, is_global_zero=True, global_step=7, loggers=[], **more
    )
    callback.on_validation_end(trainer, None)


def test_an_alert_when_acceptance_falls_while_the_loss_falls(run, caplog):
    callback = Watch(patience=2)
    for acceptance, loss in [(2.0, 3.0), (1.9, 2.9), (2.1, 2.8), (2.0, 2.7)]:
        validated(callback, acceptance, loss)
    assert not run.alerts  # once below the best, then a new best, then once below it
    resumed = Watch(patience=2)
    resumed.load_state_dict(callback.state_dict())
    validated(resumed, 1.95, 2.6)
    (sent,) = run.alerts
    assert "Acceptance falls" in sent["title"] and "1.950 (best 2.100)" in sent["text"] and len(sent["title"]) < 64
    assert "Acceptance falls" in caplog.text  # also logged without W&B


def test_no_alert_when_both_get_worse_or_the_fall_is_noise(run):
    callback = Watch(patience=1, min_drop=0.05)
    for acceptance, loss in [(2.0, 3.0), (1.5, 3.1), (1.97, 2.9)]:
        validated(callback, acceptance, loss)
    assert not run.alerts


def test_a_loss_that_is_not_finite_is_alerted_and_other_errors_are_not(run):
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    Watch().on_exception(trainer, None, ValueError("data.source.path is missing"))
    Watch().on_exception(trainer, None, KeyboardInterrupt())
    assert not run.alerts
    Watch().on_exception(trainer, None, ValueError("the loss is not finite at step 3"))
    assert run.alerts[0]["title"] == "The loss is not finite"


def test_compute_is_logged_in_the_row_of_a_validation(run):
    logged = {}
    metrics = {"compute/tokens": 10.0, "compute/flops": 1e9, "val/loss": 1.0}
    trainer = SimpleNamespace(callback_metrics=metrics, sanity_checking=False, is_global_zero=True, loggers=[])
    Watch().on_validation_epoch_end(trainer, SimpleNamespace(log_dict=logged.update))
    assert logged == {"compute/tokens": 10.0, "compute/flops": 1e9}
    Watch().on_fit_start(trainer, None)
    assert {"compute/tokens", "compute/flops", "compute/seconds"} <= set(run.metrics)


@pytest.mark.parametrize("values", [{"patience": 0}, {"min_drop": -1.0}])
def test_invalid_arguments_are_refused(values):
    with pytest.raises(ValueError, match="callbacks"):
        watch.Watch(**values)


def test_a_row_of_the_prompt_table_marks_what_was_drafted_and_accepted():
    record = Record("validation", "p", 0, "draft", "chain", num_tokens=6, token_ids=[0, 1, 2, 3, 4, 5])
    record.accepted, record.drafted, record.nodes = [2, 0], [2, 2], [2, 2]
    record.proposals = [[1, 2], [9, 8]]
    record.seconds = {"verify": 0.5}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    (row,) = prompt_rows([record], tokenizer, {"p": "why?"})
    found = dict(zip(COLUMNS, row, strict=True))
    assert found["drafted_and_accepted"] == "<0>⟦<1><2>⟧<3>~~<9>~~⟨<4>⟩<5>"
    assert (found["question"], found["acceptance_length"], found["seconds"]) == ("why?", 2.0, 0.5)
    assert depth_rows([record]) == [[1, 0.5, 0.5], [2, 1.0, 0.5]]


def test_run_is_named_by_its_differing_keys():
    assert run_label("smoke", "experiment=smoke,model.alignment.depth=1,model/loss=eagle,logger=csv,seed=2") == (
        "smoke depth=1 loss=eagle seed=2"
    )
    assert run_label("quickstart", "") == "quickstart"
