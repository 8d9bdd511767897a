from __future__ import annotations

import os

from report_factory import write_run

from hass_lightning.report.curves import by_step, loss_terms, read_curves, smooth, thin
from hass_lightning.report.plots import acceptance_figure, accuracy_figure, loss_figure, training_speed_figure


def test_sparse_columns_become_curves(tmp_path):
    curves = read_curves(write_run(tmp_path / "run"))
    assert len(curves["train/loss"]) == 100
    assert [step for step, _ in curves["val/loss"]] == [24, 49, 74, 99]
    assert list(by_step(curves, "val/survival")) == [1, 2, 3, 4, 5]
    assert loss_terms(curves) == ["feature", "top_k"]
    assert "epoch" not in curves


def test_curves_of_a_resumed_run_continue_the_stored_part(tmp_path):
    (tmp_path / "csv").mkdir()
    before, now = tmp_path / "csv" / "metrics.1.csv", tmp_path / "csv" / "metrics.csv"
    before.write_text("step,train/loss\n1,5\n2,4\n3,9\n")
    now.write_text("step,train/loss\n3,3\n4,2\n")
    os.utime(before, (1, 1))
    assert read_curves(tmp_path)["train/loss"] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]


def test_broken_cells_are_left_out(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,a,b\n1,nan,\n2,inf,x\n3,1.5\n,7,7\n4,2,3,4\n5,\n")
    assert read_curves(tmp_path) == {"a": [(3, 1.5), (4, 2.0)], "b": [(4, 3.0)]}
    assert read_curves(tmp_path / "nowhere") == {}


def test_smooth_and_thin():
    curve = [(step, float(step % 2)) for step in range(1000)]
    assert len(smooth(curve, 20)) == 1000 and abs(smooth(curve, 20)[500][1] - 0.5) < 0.05
    assert smooth(curve, 0) == curve
    assert len(thin(curve, 100)) <= 101 and thin(curve, 100)[-1] == curve[-1] and thin(curve, 1000) == curve


def test_figures_have_axis_titles_and_all_steps(tmp_path):
    curves = read_curves(write_run(tmp_path / "run", depth=2))
    figure = loss_figure(curves)
    assert {trace.name for trace in figure.data} >= {"step 1", "step 2", "total, training", "total, validation"}
    assert figure.layout.yaxis.title.text == "loss per loss position"
    accuracy = accuracy_figure(curves)
    assert {trace.name for trace in accuracy.data} >= {f"alignment step {k}" for k in range(1, 6)}
    assert acceptance_figure(curves).data[0].y == (2.1,) * 4
    assert training_speed_figure(curves) is not None


def test_nothing_logged_nothing_drawn():
    for figure in (loss_figure, accuracy_figure, acceptance_figure, training_speed_figure):
        assert figure({}) is None


def test_final_measurement_is_the_last_point():
    figure = acceptance_figure({"val/acceptance_length": [(5, 1.5), (9, 2.0)], "decode/acceptance_length": [(0, 2.2)]})
    assert figure.data[1].x == (9,)


def test_accuracy_of_training_only_has_one_panel():
    assert accuracy_figure({"train/accuracy/step1": [(1, 0.5), (2, 0.6)]}).layout.xaxis.domain == (0.0, 1.0)


def test_one_point_is_a_marker():
    assert loss_figure({"train/loss": [(1, 2.0)]}).data[0].mode == "markers"
