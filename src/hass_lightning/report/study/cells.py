"""Grouping of runs into cells and factors. Runs of a cell differ only in their seed; factors distinguish the cells."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from typing import Any

import yaml

from hass_lightning.measure.factorial import strength
from hass_lightning.report.provenance_text import flatten
from hass_lightning.report.study.runs import ABSENT, NO_SETTING, StudyRun, differing
from hass_lightning.runs.names import short_keys

Factors = dict[str, list[Any]]  # the level of each cell by factor name


@dataclass
class StudyCell:
    """The runs of one cell, its level of each factor, and their common settings."""

    label: str
    levels: dict[str, Any]
    runs: list[StudyRun]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its runs."""
        return self.runs[0].settings


@dataclass(frozen=True)
class Grid:
    """A crossing of two or more factors: `cells` are indices into the study, `levels` start with the reference.

    `strength` is that of a fraction of the combinations (measure/factorial.py); None: the crossing is full.
    """

    cells: tuple[int, ...]
    levels: dict[str, list[Any]]
    left_out: tuple[str, ...] = field(default=())
    strength: int | None = None


def make_cells(runs: Sequence[StudyRun]) -> list[StudyCell]:
    """Group runs by their settings, in the order of their first runs."""
    groups: dict[tuple[Any, ...], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault(_settings_key(run), []).append(run)
    grouped = list(groups.values())
    factors = find_factors([group[0] for group in grouped])
    cells = []
    for position, group in enumerate(grouped):
        levels = {name: values[position] for name, values in factors.items()}
        said = {name: level for name, level in levels.items() if level != ABSENT} or levels
        label = ", ".join(f"{name}={show(level)}" for name, level in said.items()) or group[0].name
        cells.append(StudyCell(label, levels, group))
    return cells


def without_repeats(runs: Sequence[StudyRun]) -> tuple[list[StudyRun], list[tuple[str, str]]]:
    """Return the first run of each (settings, seed), and the others with the reason for leaving them out.

    A repeated run is not a new sample: counted twice, it would reduce intervals and p-values.
    """
    first: dict[tuple[Any, ...], StudyRun] = {}
    repeats = []
    for run in runs:
        key = (*_settings_key(run), run.seed)
        if key in first:
            repeats.append((run.name, f"repeats {first[key].name}: the same settings and the same seed"))
        else:
            first[key] = run
    return list(first.values()), repeats


def _settings_key(run: StudyRun) -> tuple[Any, ...]:
    return tuple(sorted((name, str(value)) for name, value in run.settings.items())) or (str(run.folder.resolve()),)


def show(level: Any) -> str:
    """Return a level as shown in labels."""
    if isinstance(level, tuple):
        return f"[{','.join(show(each) for each in level)}]"
    return f"{level:g}" if isinstance(level, float) else str(level)


def find_factors(runs: Sequence[StudyRun]) -> Factors:
    """Return the fewest factors that distinguish these runs, by their shortest names.

    Keys that change together are one factor. Two or more config keys that are fully crossed take precedence
    (`experiment=eagle,had,…` becomes loss × depth), then the overrides of the command lines if they distinguish all
    runs, then the config keys.
    """
    words = _by_partition(differing([_typed_overrides(run.overrides) for run in runs]))
    keys = _by_partition(differing([run.settings for run in runs]))
    for part, names in list(keys.items()):
        if part in words:  # the config has the value if a command line does not
            said_of = words[part].items()
            keys[part] = words[part] = {key: names.get(key, v) if ABSENT in v else v for key, v in said_of}
        elif len(names) > 1:
            keys[part] = {_common_node(list(names)): _presence(next(iter(names.values())))}
    said = [part for part in words if part in keys]  # in the order of the command line, others last
    by_key = _shortest_names({part: keys[part] for part in [*said, *(part for part in keys if part not in said)]})
    by_word = _shortest_names(words)
    if len(by_key) >= 2 and len(runs) == _num_combinations(by_key):
        return _short_names(by_key)
    told = len(set(zip(*by_word.values(), strict=True))) if by_word else 0
    return _short_names(by_word if told == len(runs) else by_key)


def _typed_overrides(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return the overrides that can affect a result as typed values.

    `term={k:1,weight:2}` becomes `term.k=1` and `term.weight=2`.
    """
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if key != "seed" and key.split(".")[0] not in NO_SETTING:
            parsed = _parsed(value)
            found |= flatten(parsed, f"{key}.") if isinstance(parsed, dict) else {key: parsed}
    return found


def _parsed(value: str) -> Any:
    """Parse `3` as a number, `[1,2]` as a tuple, `{k:1}` as a dict; other text is unchanged (such as `{0:1}`)."""
    try:
        # YAML needs a space after a colon, Hydra does not
        found = yaml.safe_load(re.sub(r"([{,]\s*[\w.]+):(?=\S)", r"\1: ", value))
        if isinstance(found, str) and math.isfinite(number := float(found)):  # 1e-3 is a string in YAML 1.1
            return number
    except (yaml.YAMLError, ValueError):
        return value
    if isinstance(found, list):
        return tuple(map(str, found))
    if isinstance(found, dict) and all(isinstance(key, str) for key in found):
        return found
    return found if isinstance(found, int | float | bool) else value


def partition(values: Sequence[Any]) -> tuple[int, ...]:
    """Return which cells share a value, whatever the values are."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(repr(value), len(seen)) for value in values)


def _by_partition(keys: Mapping[str, list[Any]]) -> dict[tuple[Any, ...], Factors]:
    """Group keys by the partition of the cells that they induce."""
    groups: dict[tuple[Any, ...], Factors] = {}
    for key, values in keys.items():
        groups.setdefault(partition(values), {})[key] = values
    return groups


def _common_node(names: Sequence[str]) -> str:
    """Return the node that contains all these keys, or the shortest of them."""
    parts = [name.split(".") for name in names]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared) or min(names, key=len)


def _presence(values: list[Any]) -> list[Any]:
    """Replace the values of a node that only some cells have by "with" and "without"."""
    if ABSENT in values and len(set(map(repr, values))) == 2:
        return ["without" if value == ABSENT else "with" for value in values]
    return values


def _shortest_names(groups: Mapping[tuple[Any, ...], Factors]) -> Factors:
    return {min(keys, key=len): keys[min(keys, key=len)] for keys in groups.values()}


def _num_combinations(factors: Factors) -> int:
    return math.prod(len(set(map(repr, values))) for values in factors.values())


def _short_names(factors: Factors) -> Factors:
    """Return the factors under their short names: `model.alignment.depth` becomes `depth`."""
    names = short_keys(factors)
    return {names[key]: values for key, values in factors.items()}


def find_grid(cells: Sequence[StudyCell], baseline: int) -> Grid | None:
    """Return the fully crossed part of the cells, the baseline's levels first; None with fewer than two factors in it.

    All cells together may instead be a fraction of a crossing that determines the main effects (strength 3 or more).
    If combinations are missing, the levels that miss the most of them are left out one by one, the baseline's own last.
    A baseline that lacks a factor (a cell without a loss term) is not part of the crossing, and the first cell that has
    all factors is the reference.
    """
    grid = _fraction(cells, baseline) or _crossing(cells, list(range(len(cells))), baseline)
    inside = [number for number, cell in enumerate(cells) if ABSENT not in cell.levels.values()]
    if grid or baseline in inside or not inside:
        return grid
    grid = _crossing(cells, inside, inside[0])
    outside = tuple(cell.label for cell in cells if ABSENT in cell.levels.values())
    return grid and replace(grid, left_out=(*outside, *grid.left_out))


def _fraction(cells: Sequence[StudyCell], baseline: int) -> Grid | None:
    """Return all cells if they are a fraction of strength 3 or more of a full crossing, and not the whole of it."""
    home = cells[baseline].levels
    levels = {name: _ordered([cell.levels[name] for cell in cells], home[name]) for name in home}
    if len(cells) >= math.prod(map(len, levels.values())):
        return None
    found = strength([cell.levels for cell in cells], levels)
    return Grid(tuple(range(len(cells))), levels, strength=found) if found >= 3 else None


def _crossing(cells: Sequence[StudyCell], used: Sequence[int], baseline: int) -> Grid | None:
    home = cells[baseline].levels
    levels = {name: _ordered([cells[position].levels[name] for position in used], home[name]) for name in home}
    at = {tuple(repr(cells[position].levels[name]) for name in home): position for position in used}
    left_out: list[str] = []
    while len([name for name in levels if len(levels[name]) > 1]) >= 2:
        wanted = list(product(*([repr(level) for level in levels[name]] for name in home)))
        missing = [combination for combination in wanted if combination not in at]
        if not missing:
            factors = {name: found for name, found in levels.items() if len(found) > 1}
            return Grid(tuple(at[combination] for combination in wanted), factors, tuple(left_out))
        worst: tuple[float, str, Any] | None = None
        for place, name in enumerate(home):
            for level in levels[name][1:]:  # the first is the baseline's
                share = sum(each[place] == repr(level) for each in missing) * len(levels[name]) / len(wanted)
                if worst is None or share > worst[0]:
                    worst = (share, name, level)
        assert worst is not None
        levels[worst[1]] = [level for level in levels[worst[1]] if repr(level) != repr(worst[2])]
        left_out.append(f"{worst[1]}={show(worst[2])}")
    return None


def _ordered(values: Sequence[Any], first: Any) -> list[Any]:
    """Return distinct levels: `first`, then the others, numbers in increasing order."""
    found = list({repr(value): value for value in values}.values())
    if all(isinstance(value, int | float) for value in found):
        found.sort()
    return [first, *(value for value in found if repr(value) != repr(first))]


def find_baseline(cells: Sequence[StudyCell], wanted: str | None) -> int:
    """Return the cell that the others are compared with: the first, or the one that `wanted` selects.

    Args:
        cells: the cells of the study.
        wanted: a label, a run folder's name, `factor=level,…`, or None.

    Raises:
        ValueError: if no cell or several cells match.
    """
    if not wanted:
        return 0
    for position, cell in enumerate(cells):
        if wanted == cell.label or wanted in [run.name for run in cell.runs]:
            return position
    terms = [term.strip() for term in wanted.split(",")]
    fitting = [
        position
        for position, cell in enumerate(cells)
        if set(terms) <= {f"{name}={show(level)}" for name, level in cell.levels.items()}
    ]
    if len(fitting) != 1:
        known = "; ".join(cell.label for cell in cells)
        raise ValueError(f"baseline={wanted} matches {len(fitting)} cells but must match one of: {known}.")
    return fitting[0]
