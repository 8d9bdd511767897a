"""A compiled loss and packed weights do not change results, with any trainer."""

import csv
import json

import pytest

RUN = (
    "experiment=smoke", "logger=csv", "num_threads=1", "trainer.max_epochs=null", "trainer.max_steps=6",
    "trainer.val_check_interval=6", "trainer.log_every_n_steps=1", "data.batch_size=2",
)  # fmt: skip


def losses(run_dir):
    with (run_dir / "csv" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu", "deepspeed_zero2"])
def test_compiled_loss_and_packed_weights_do_not_change_a_run(run_command, tmp_path, trainer):
    found = {}
    for on in ("false", "true"):
        words = (f"trainer={trainer}", f"model.loss.compile={on}", f"target.packed={on}")
        done = run_command("train", *RUN, *words, f"hydra.run.dir={tmp_path / on}")
        assert done.code == 0, done.err[-3000:]
        found[on] = json.loads(done.out.splitlines()[-1])
    plain, fast = (losses(tmp_path / on) for on in ("false", "true"))
    assert len(plain) == 6
    assert fast == pytest.approx(plain, rel=1e-4)
    lengths = [found[on]["simulated_acceptance_length"] for on in ("false", "true")]
    assert lengths[0] == pytest.approx(lengths[1], abs=0.05)
    assert found["true"]["num_identical"] == found["true"]["num_checked"] > 0
