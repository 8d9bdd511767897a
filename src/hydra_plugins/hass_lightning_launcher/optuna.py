"""`hydra/sweeper=optuna`: the plugin's sweeper with maximization, Hydra's ranges, and a required metric.

The plugin minimizes by default, and passes `range(1, 6)` to Optuna as the closed interval from 1 to 6. If it is not
installed, this module changes nothing.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import RangeSweep
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hass_lightning.runs.screen import print_error

try:
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
except ImportError:
    OptunaSweeper = None  # type: ignore[assignment, misc]


def half_open(override: str) -> str:
    """Return the override with the end of a range replaced by its last value, because Optuna includes the end.

    Raises:
        ValueError: if the range is empty.
    """
    parsed = OverridesParser.create().parse_override(override)
    value = parsed.value()
    if not parsed.is_sweep_override() or not isinstance(value, RangeSweep) or value.shuffle:
        return override
    assert value.start is not None and value.stop is not None
    steps = math.ceil((value.stop - value.start) / value.step - 1e-9)
    if steps < 1:
        raise ValueError(f"{override} is an empty range: its end is excluded, as in Python.")
    last = value.start + (steps - 1) * value.step
    return f"{override.split('=', 1)[0]}=range({value.start},{last},{value.step})"


def adopt(config: DictConfig) -> None:
    """Use the sweeper below in a multirun that asks for the plugin's sweeper; it maximizes unless a direction is set.

    A direction from a YAML file or the command line is a string; the plugin's own default is an Enum.
    """
    sweeper = config.hydra.sweeper
    if sweeper is None or not str(sweeper.get("_target_")).endswith(
        "hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    ):
        return
    with read_write(config), open_dict(config):
        sweeper._target_ = f"{__name__}.HalfOpenOptunaSweeper"
        if isinstance(sweeper.direction, Enum):
            sweeper.direction = "maximize"


def check_metric(config: Any) -> None:
    """Raise an error for a search whose `optimized_metric` is measured by decoding when nothing is decoded.

    Raises:
        ValueError: naming both keys.
    """
    metric = str(OmegaConf.select(config, "optimized_metric", default=""))
    if metric.startswith("decode/") and OmegaConf.select(config, "callbacks.decoding", default=True) is None:
        raise ValueError(
            f"optimized_metric={metric} is measured by decoding, but callbacks.decoding=null, so no trial would have "
            "a metric. Set optimized_metric=simulated_acceptance_length."
        )


if OptunaSweeper is not None:

    class HalfOpenOptunaSweeper(OptunaSweeper):
        """The plugin's sweeper over half-open ranges."""

        def setup(self, **context: Any) -> None:
            """Check the metric first; an invalid config ends with one sentence."""
            try:
                check_metric(context["config"])
                if params := self.sweeper.params:
                    ranges = {str(key): half_open(f"{key!s}={value}").split("=", 1)[1] for key, value in params.items()}
                    self.sweeper.params = OmegaConf.create(ranges)
            except ValueError as error:
                _end(error)
            super().setup(**context)

        def sweep(self, arguments: list[str]) -> None:
            """Run the search."""
            try:
                arguments = [half_open(argument) for argument in arguments]
            except ValueError as error:
                _end(error)
            return super().sweep(arguments)


def _end(error: ValueError) -> None:
    print_error(str(error))
    raise SystemExit(1)
