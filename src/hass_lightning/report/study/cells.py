"""Runs to cells: a cell is all runs that differ in nothing but their seed; factors are what tells cells apart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from typing import Any

import yaml  # type: ignore[import-untyped]

from hass_lightning.report.study.runs import ABSENT, NO_SETTING, StudyRun, differing, flatten

Factors = dict[str, list[Any]]  # name to the level of each cell


@dataclass
class StudyCell:
    """The runs of one cell, its level of each factor, and the settings that they share."""

    label: str
    levels: dict[str, Any]
    runs: list[StudyRun]

    @property
    def settings(self) -> dict[str, Any]:
        """What its runs were made from."""
        return self.runs[0].settings


@dataclass(frozen=True)
class Grid:
    """A full crossing of two or more factors: `cells` are positions in the study, `levels` have the reference first."""

    cells: tuple[int, ...]
    levels: dict[str, list[Any]]
    left_out: tuple[str, ...] = field(default=())


def make_cells(runs: Sequence[StudyRun]) -> list[StudyCell]:
    """Group runs by what they were made from, in the order of their first runs."""
    groups: dict[tuple, list[StudyRun]] = {}
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
    """The first run of each (settings, seed), and the others with the reason why they are left out.

    A repeated run is no new draw: counted twice, it would shrink intervals and p-values.
    """
    first: dict[tuple, StudyRun] = {}
    repeats = []
    for run in runs:
        key = (*_settings_key(run), run.seed)
        if key in first:
            repeats.append((run.name, f"repeats {first[key].name}: the same settings and the same seed"))
        else:
            first[key] = run
    return list(first.values()), repeats


def _settings_key(run: StudyRun) -> tuple:
    return tuple(sorted((name, str(value)) for name, value in run.settings.items())) or (str(run.folder.resolve()),)


def show(level: Any) -> str:
    """A level as its label has it."""
    if isinstance(level, tuple):
        return f"[{','.join(show(each) for each in level)}]"
    return f"{level:g}" if isinstance(level, float) else str(level)


def find_factors(runs: Sequence[StudyRun]) -> Factors:
    """What tells these runs apart, as few factors as it takes, by their shortest names.

    Keys that change together are one factor. Two or more config keys that cross fully win (`experiment=eagle,had,…` is
    seen as loss × depth); else the words of the command lines, where they say it all; else the config keys.
    """
    words = _together(differing([_words(run.overrides) for run in runs]))
    keys = _together(differing([run.settings for run in runs]))
    for part, names in list(keys.items()):
        if part in words:  # where a command line is silent, the config says it
            said_of = words[part].items()
            keys[part] = words[part] = {key: names.get(key, v) if ABSENT in v else v for key, v in said_of}
        elif len(names) > 1:
            keys[part] = {_common(list(names)): _presence(next(iter(names.values())))}
    said = [part for part in words if part in keys]  # in the order of the command line, the others behind
    by_key = _named({part: keys[part] for part in [*said, *(part for part in keys if part not in said)]})
    by_word = _named(words)
    if len(by_key) >= 2 and len(runs) == _crossed(by_key):
        return _short(by_key)
    told = len(set(zip(*by_word.values(), strict=True))) if by_word else 0
    return _short(by_word if told == len(runs) else by_key)


def _words(overrides: Mapping[str, str]) -> dict[str, Any]:
    """Overrides that can decide a result, typed; `term={k:1,weight:2}` is `term.k=1` and `term.weight=2`."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "seed" or key.split(".")[0] in NO_SETTING:
            continue
        parsed = _parsed(value)
        if isinstance(parsed, dict):
            found |= flatten(parsed, f"{key}.")
        else:
            found[key] = parsed
    return found


def _parsed(value: str) -> Any:
    """`3` as a number, `[1,2]` as a tuple, `{k:1}` as a dict, else as it is written (a schedule `{0:1}`, too)."""
    try:
        # Hydra needs no space behind a colon, YAML does
        found = yaml.safe_load(re.sub(r"([{,]\s*[\w.]+):(?=\S)", r"\1: ", value))
        if isinstance(found, str) and math.isfinite(number := float(found)):  # 1e-3 is a string to YAML 1.1
            return number
    except (yaml.YAMLError, ValueError):
        return value
    if isinstance(found, list):
        return tuple(map(str, found))
    if isinstance(found, dict) and all(isinstance(key, str) for key in found):
        return found
    return found if isinstance(found, int | float | bool) else value


def partition(values: Sequence[Any]) -> tuple[int, ...]:
    """Which cells share a value, whatever the values are."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(repr(value), len(seen)) for value in values)


def _together(keys: Mapping[str, list[Any]]) -> dict[tuple, Factors]:
    """Keys by the partition of the cells that they make."""
    groups: dict[tuple, Factors] = {}
    for key, values in keys.items():
        groups.setdefault(partition(values), {})[key] = values
    return groups


def _common(names: Sequence[str]) -> str:
    """The node that holds all these keys, or the shortest of them."""
    parts = [name.split(".") for name in names]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared) or min(names, key=len)


def _presence(values: list[Any]) -> list[Any]:
    """A node that some cells have and others lack: with and without."""
    if ABSENT in values and len(set(map(repr, values))) == 2:
        return ["without" if value == ABSENT else "with" for value in values]
    return values


def _named(groups: Mapping[tuple, Factors]) -> Factors:
    return {min(keys, key=len): keys[min(keys, key=len)] for keys in groups.values()}


def _crossed(factors: Factors) -> int:
    count = 1
    for values in factors.values():
        count *= len(set(map(repr, values)))
    return count


def _short(factors: Factors) -> Factors:
    """Names cut to the fewest last parts that tell them apart: `model.alignment.depth` becomes `depth`."""
    parts = {name: name.replace("/", ".").split(".") for name in factors}
    result: Factors = {}
    for name, values in factors.items():
        for length in range(1, len(parts[name]) + 1):
            short = parts[name][-length:]
            if sum(other[-length:] == short for other in parts.values()) == 1:
                break
        result[".".join(short)] = values
    return result


def find_grid(cells: Sequence[StudyCell], baseline: int) -> Grid | None:
    """The fully crossed part of the cells, the baseline's levels first; None with fewer than two factors in it.

    Where combinations are missing, the levels that miss the most of them are left out, one after the other, the
    baseline's own last. A baseline that lacks a factor (a study's cell without a loss term) is outside of the crossing,
    and the first cell that has all of them is the reference.
    """
    grid = _crossing(cells, list(range(len(cells))), baseline)
    inside = [number for number, cell in enumerate(cells) if ABSENT not in cell.levels.values()]
    if grid or baseline in inside or not inside:
        return grid
    grid = _crossing(cells, inside, inside[0])
    outside = tuple(cell.label for cell in cells if ABSENT in cell.levels.values())
    return grid and replace(grid, left_out=(*outside, *grid.left_out))


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
    """Distinct levels, `first` first, numbers in their order."""
    found = list({repr(value): value for value in values}.values())
    if all(isinstance(value, int | float) for value in found):
        found.sort()
    return [first, *(value for value in found if repr(value) != repr(first))]


def find_baseline(cells: Sequence[StudyCell], wanted: str | None) -> int:
    """The cell that all others are compared with: a label, a run folder's name, or `factor=level,…`; else the first.

    Raises:
        ValueError: none or several fit.
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
        raise ValueError(f"baseline={wanted} fits {len(fitting)} cells and must fit one of: {known}.")
    return fitting[0]
