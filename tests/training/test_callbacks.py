"""The callbacks on a small run: what they save, log and refuse."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from training_toys import make_module, make_small_trainer

from hass_lightning.decoding import DynamicTree
from hass_lightning.draft import load_draft
from hass_lightning.training.callbacks import DecodingBenchmark, SaveBestDraft, Throughput

TREE = DynamicTree(num_nodes=6, depth=2, width=2)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_saves_its_best_head_and_logs_speed_and_decoding(tiny, data, tmp_path):
    kept = torch.arange(0, 259, 2)
    callbacks = [
        SaveBestDraft(str(tmp_path / "draft")),
        Throughput(),
        DecodingBenchmark(TREE, num_prompts=2, max_new_tokens=8, every_n_validations=2),
    ]
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = make_small_trainer(
        data, tmp_path, callbacks, [logger], max_steps=8, max_epochs=None, val_check_interval=2
    )
    module = make_module(tiny, token_ids=kept)
    trainer.fit(module, datamodule=data)
    logged = rows(tmp_path)
    decoded = [row for row in logged if row.get("decode/acceptance_length")]
    assert [int(row["step"]) for row in decoded] == [4, 8]
    assert all(float(row["decode/acceptance_length"]) >= 1 for row in decoded)
    speeds = [float(row["train/tokens_per_second"]) for row in logged if row.get("train/tokens_per_second")]
    waits = [float(row["train/data_wait_fraction"]) for row in logged if row.get("train/data_wait_fraction")]
    assert len(speeds) == 8
    assert min(speeds) > 0
    assert all(0 <= wait <= 1 for wait in waits)
    assert sum(waits) > 0
    saved = load_draft(tmp_path / "draft")
    assert torch.equal(saved.token_ids, kept)
    assert saved.notes["target_fingerprint"] == tiny.fingerprint
    assert saved.notes["alignment_depth"] == 3
    assert saved.notes["loss_terms"] == {"feature": 1.0, "soft_ce": 0.1, "top_k": 1.0}
    values = [float(row["val/acceptance_length"]) for row in logged if row.get("val/acceptance_length")]
    assert saved.notes["val/acceptance_length"] == pytest.approx(max(values))
    # after decoding, training continued in training mode, and decoding did not change the weights
    assert module.training
    assert all(p.requires_grad for p in module.draft.parameters())


def test_decoding_during_training_does_not_change_training(tiny, data, tmp_path):
    heads = []
    for every in (0, 1):
        callback = DecodingBenchmark(TREE, num_prompts=1, max_new_tokens=4, every_n_validations=every)
        trainer = make_small_trainer(data, tmp_path, [callback], max_steps=4, max_epochs=None, val_check_interval=2)
        module = make_module(tiny)
        trainer.fit(module, datamodule=data)
        heads.append(module.draft.state_dict())
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def validated(callback, tiny, module, value, step):
    trainer = SimpleNamespace(
        callback_metrics={"val/acceptance_length": torch.tensor(value)}, sanity_checking=False, is_global_zero=True,
        global_step=step, datamodule=SimpleNamespace(target=tiny),
    )  # fmt: skip
    callback.on_validation_end(trainer, module)


def test_only_a_better_value_is_saved_and_a_resumed_run_knows_the_best(tiny, tmp_path):
    module, callback = make_module(tiny), SaveBestDraft(str(tmp_path))

    def step_saved():
        return json.loads((tmp_path / "config.json").read_text())["hass_lightning"]["step"]

    for step, (value, expected) in enumerate([(1.5, 0), (1.2, 0), (1.5, 0), (1.6, 3)]):
        validated(callback, tiny, module, value, step)
        assert step_saved() == expected
    resumed = SaveBestDraft(str(tmp_path))
    resumed.load_state_dict(callback.state_dict())
    validated(resumed, tiny, module, 1.55, 9)
    assert step_saved() == 3


def test_decoding_while_training_is_refused_under_zero_3(tiny):
    trainer = SimpleNamespace(strategy=SimpleNamespace(config={"zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match=r"every_n_validations must be 0 under ZeRO-3.*hass-benchmark"):
        DecodingBenchmark(TREE, every_n_validations=1).setup(trainer, None, "fit")
    DecodingBenchmark(TREE).setup(trainer, None, "fit")


def test_measurement_compares_with_autoregressive_decoding_and_checks_in_fp32(tiny, data, tmp_path):
    data.tokens()
    module = make_module(tiny)
    from hass_lightning.draft import save_draft

    save_draft(tmp_path / "draft", module.draft, None, {})
    callback = DecodingBenchmark(TREE, num_prompts=3, max_new_tokens=8, num_checked=2)
    records_path = tmp_path / "records.jsonl"
    bf16 = tiny.in_dtype(torch.bfloat16)
    summary, records, checked = callback.measure(
        bf16, load_draft(tmp_path), data.validation_conversations, records_path=records_path
    )
    assert checked == {"num_checked": 2, "num_identical": 2}
    assert {row["decoder"] for row in summary} == {"autoregressive", "dynamic_tree"}
    assert len(records) == 6 == len(records_path.read_text().splitlines())
    assert all("assistant" not in {m.role for m in c.messages[:1]} for c in data.validation_conversations)
