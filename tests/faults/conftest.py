"""Fixtures for the tests of faults: a short run on the tiny target, with corpus and features made once."""

import json
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="session")
def short_run(corpus_folder):
    """Overrides of a run of four steps without decoding."""
    return (
        "experiment=smoke", "logger=csv", "trainer.max_steps=4", "trainer.log_every_n_steps=1",
        "callbacks.decoding=null", "trainer.enable_model_summary=false", f"data.source.output_dir={corpus_folder}",
    )  # fmt: skip


@pytest.fixture
def train(call_command, short_run, tmp_path):
    """Call `hass-train` with the short run's overrides: .code, .out, .err, .run (its folder), .result, .error."""

    def call(*overrides):
        done = call_command("train", *short_run, *overrides)
        lines = [line for line in done.out.splitlines() if line.startswith("{")]
        errors = [line for line in done.err.splitlines() if line.startswith("error:")]
        result = json.loads(lines[-1]) if lines else {}
        return SimpleNamespace(
            code=done.code, out=done.out, err=done.err, result=result, error=errors[0] if errors else "",
            traced="Traceback" in done.err,
        )  # fmt: skip

    return call
