"""Choice of kernels: measured, stored, and set by hand."""

import json
import logging

import pytest
import torch

from hass_lightning.target_model import TargetModel, kernels
from hass_lightning.target_model.kernels import ROW_CLASSES, Choice, can_pack, choose, set_mode
from hass_lightning.target_model.tiny import tiny_llama

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="oneDNN is not in this torch")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Mode `auto` without stored choices."""
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setenv("HASS_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_measure_again", True)  # a chat in this process turns it off
    yield
    set_mode("auto")


@pytest.fixture
def seconds(monkeypatch):
    """Set the times of the kernels, in order of ROW_CLASSES, and return the list of timed kernels."""
    calls = []

    def set_seconds(*by_class, disturbed=False):
        def best(run, before):
            calls.append(sorted(run))
            return {name: by_class[(len(calls) - 1) % len(by_class)][name] for name in run}, not disturbed

        monkeypatch.setattr(kernels, "_best_seconds", best)
        return calls

    return set_seconds


WIDE, NARROW = torch.zeros(1024, 512), torch.zeros(512, 1024)
FAST, SLOW = {"packed": 1.0, "plain": 2.0}, {"packed": 2.0, "plain": 1.0}


@needs_packing
def test_each_number_of_rows_uses_the_faster_kernel(seconds):
    seconds({"packed": 2.0, "plain": 3.0, "inputs first": 1.0}, FAST, SLOW, FAST)
    choice = choose(WIDE, reorder=True)
    assert choice == Choice(inputs_first=True, packed=(4, 64))
    assert [choice.takes_packed(rows) for rows in (1, 2, 4, 5, 16, 17, 64, 65)] == [
        False, True, True, False, False, True, True, False,
    ]  # fmt: skip


@needs_packing
def test_packed_copy_needs_the_required_gain(seconds):
    close = {"packed": 0.97, "plain": 1.0}
    seconds({"packed": 0.5, "plain": 3.0, "inputs first": 1.0}, close, close, close)
    assert choose(WIDE, reorder=True) == Choice(inputs_first=False, packed=(1,))


@needs_packing
def test_weight_is_only_reordered_if_allowed(seconds):
    calls = seconds({"packed": 2.0, "plain": 3.0}, SLOW, SLOW, SLOW)
    assert choose(WIDE) == Choice(packed=(1,))
    seconds({"packed": 2.0, "plain": 3.0, "inputs first": 1.0}, SLOW, SLOW, SLOW)
    calls.clear()
    assert choose(WIDE, reorder=True) == Choice(inputs_first=True)  # another key, measured separately


@needs_packing
def test_weight_with_few_outputs_is_not_reordered(seconds):
    calls = seconds(FAST, FAST, FAST, FAST)
    assert choose(NARROW, reorder=True).always_packed
    assert calls == [["packed", "plain"]] * len(ROW_CLASSES)


@needs_packing
def test_choice_is_stored_for_the_next_process(seconds, monkeypatch, tmp_path, caplog):
    calls = seconds(FAST, FAST, FAST, FAST)
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        first = choose(NARROW)
        assert choose(NARROW.clone()) == first
    assert len(calls) == len(ROW_CLASSES) and caplog.text.count("packed over plain") == 1
    (key,) = json.loads((tmp_path / "kernels.json").read_text())
    assert "512 x 1024" in key and torch.__version__ in key and "1 threads" in key
    monkeypatch.setattr(kernels, "_known", {})  # another process
    assert choose(NARROW) == first and len(calls) == len(ROW_CLASSES)
    torch.set_num_threads(2)
    choose(NARROW)  # another number of threads is another key
    assert len(calls) == 2 * len(ROW_CLASSES)


@needs_packing
def test_disturbed_measurement_is_used_and_repeated_by_the_next_process(seconds, monkeypatch, caplog):
    calls = seconds(FAST, FAST, FAST, FAST, disturbed=True)
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        assert choose(NARROW).always_packed
    assert "other processes disturbed" in caplog.text
    monkeypatch.setattr(kernels, "_known", {})  # another process
    assert choose(NARROW).always_packed
    assert len(calls) == 2 * len(ROW_CLASSES)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(kernels, "_measure_again", True)
    kernels.keep_disturbed()  # a chat does not wait
    assert choose(NARROW).always_packed
    assert len(calls) == 2 * len(ROW_CLASSES)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(kernels, "_measure_again", True)
    seconds(SLOW, SLOW, SLOW, SLOW)
    assert choose(NARROW) == Choice()  # a better measurement replaces it
    kernels.keep_disturbed()
    monkeypatch.setattr(kernels, "_known", {})
    assert choose(NARROW) == Choice()


def test_runs_repeat_until_the_shortest_two_agree(monkeypatch):
    durations = iter([0.05, 0.9, 0.01, 0.4, 0.0101, 0.2, 0.3, 0.21])  # of packed, plain, packed, plain, …
    times = {"now": 0.0}
    monkeypatch.setattr(kernels, "perf_counter", lambda: times["now"])
    warm = {"packed": True, "plain": True}

    def run(name):
        if warm.pop(name, False):
            return torch.empty(0)
        times["now"] += next(durations)
        return torch.empty(0)

    found, agree = kernels._best_seconds({name: lambda name=name: run(name) for name in ("packed", "plain")}, None)
    assert found == pytest.approx({"packed": 0.01, "plain": 0.2}) and agree


def test_runs_that_never_agree_end_at_the_limit(monkeypatch):
    times, number = {"now": 0.0}, iter(range(1000))
    monkeypatch.setattr(kernels, "perf_counter", lambda: times["now"])

    def run():
        times["now"] += 2.0 ** -(next(number) // 2)  # each run takes half the time of the last
        return torch.empty(0)

    _, agree = kernels._best_seconds({"packed": run, "plain": run}, None, limit=3.0)
    assert not agree and times["now"] < 20


@needs_packing
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": {"packed": 3}}'])
def test_damaged_file_is_ignored(seconds, tmp_path, content):
    (tmp_path / "kernels.json").write_text(content)
    seconds(FAST, FAST, FAST, FAST)
    assert choose(NARROW).always_packed
    assert len(json.loads((tmp_path / "kernels.json").read_text())) == 1


@needs_packing
def test_read_only_cache_is_not_an_error(seconds, monkeypatch):
    monkeypatch.setenv("HASS_LIGHTNING_CACHE", "/proc/nothing")
    seconds(FAST, FAST, FAST, FAST)
    assert choose(NARROW).always_packed


@needs_packing
def test_kernels_are_measured(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        choice = choose(torch.randn(1024, 512), reorder=True)
    assert set(choice.packed) <= set(ROW_CLASSES)
    assert not choice.inputs_first or 1 not in choice.packed
    assert (tmp_path / "kernels.json").exists() or "other processes disturbed" in caplog.text


def test_small_and_unsupported_weights_use_the_library_kernel(monkeypatch):
    assert choose(torch.zeros(64, 64)) == Choice()
    assert choose(torch.zeros(1024, 1024, dtype=torch.float64)) == Choice()
    assert choose(torch.zeros(1024, 1024, device="meta")) == Choice()
    monkeypatch.setattr(kernels, "can_pack", lambda dtype: False)
    assert choose(WIDE) == Choice()


@needs_packing
def test_mode_overrides_measurement(monkeypatch):
    set_mode(True)
    assert choose(torch.zeros(64, 64)).always_packed
    set_mode(False)
    assert choose(WIDE) == Choice()
    with pytest.raises(ValueError, match=r"target.packed=maybe is none of auto, true, false"):
        set_mode("maybe")
    set_mode(True)
    monkeypatch.setattr(kernels, "can_pack", lambda dtype: False)
    with pytest.raises(ValueError, match=r"target.packed=true: this processor cannot pack weights of torch.float32"):
        choose(WIDE)


@needs_packing
@torch.inference_mode()
def test_always_packed_target_has_one_copy_of_its_weights_and_the_same_output():
    load = {"path": tiny_llama(seed=0), "name": "tiny", "dtype": "float32"}
    plain, packed = TargetModel.load(**load, packed=False), TargetModel.load(**load, packed=True)
    assert all(p.is_meta for name, p in packed.model.named_parameters() if "_proj" in name)
    assert packed._step.released and not plain._step.released
    ids = torch.tensor([[5, 9, 200, 7, 7, 31]])
    features = plain.encode(ids)
    torch.testing.assert_close(packed.encode(ids), features, atol=1e-5, rtol=1e-5)
    for rows in (slice(0, 1), slice(0, 3)):
        logits = [target.head.logits(features[0, rows]) for target in (plain, packed)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    # a copy in another dtype has its weights, unpacked
    double = packed.in_dtype(torch.float64)
    own = dict(plain.model.named_parameters())
    assert all(torch.equal(p, own[name].double()) for name, p in double.model.named_parameters())
    torch.testing.assert_close(double.encode(ids).float(), features, atol=1e-4, rtol=1e-4)
