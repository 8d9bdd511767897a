"""Schedules: steps, linear interpolation, rounding and invalid values."""

import pytest
from omegaconf import OmegaConf

from hass_lightning.schedules import scheduled


def values(schedule, *progress):
    return [schedule.at(p) for p in progress]


def test_number_is_constant():
    assert values(scheduled("k", 3, whole=True), 0, 0.5, 1) == [3, 3, 3]


def test_steps_hold_until_the_next_point():
    assert values(scheduled("w", {0: 0.0, 0.8: 1.0}), 0, 0.79, 0.8, 1) == [0, 0, 1, 1]
    assert values(scheduled("w", {0.5: 2.0, 0.75: 1.0}), 0, 0.5, 0.75) == [2, 2, 1]  # constant before the first point


def test_linear_interpolation_between_points():
    ramp = scheduled("w", {0: 0, 0.5: 1, "shape": "linear"})
    assert values(ramp, 0, 0.25, 0.5, 1) == pytest.approx([0, 0.5, 1, 1])
    depth = scheduled("depth", OmegaConf.create({0: 1, 1: 3, "shape": "linear"}), least=1, whole=True)
    assert values(depth, 0, 0.2, 0.3, 0.7, 0.8, 1) == [1, 1, 2, 2, 3, 3]
    assert all(isinstance(value, int) for value in values(depth, 0, 0.4, 1))


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("much", {}), ({}, {}), ({"shape": "linear"}, {}), ({0: 1, "shape": "cubic"}, {}), ({1.1: 1}, {}),
        ({-0.1: 1}, {}), ({0: "a"}, {}), ([0, 1], {}), (None, {}), ({0: 1, 0.5: -1}, {"least": 0}),
        (0, {"least": 1}), (1.5, {"whole": True}),
    ],
)  # fmt: skip
def test_invalid_schedule_names_the_key(value, options):
    with pytest.raises(ValueError, match=r"model\.some\.key="):
        scheduled("model.some.key", value, **options)
