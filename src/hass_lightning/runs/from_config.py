"""Target, decoding and data of a command that follow from the run whose head `draft` names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from hass_lightning.runs.folder import run_folder

FOLLOWED = ("target", "decoding", "data")


def follow_run(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return `config` with the target, decoding and data of the run that `draft` (or the first of `drafts`) names.

    A group keeps what the command line chose for it (`target=…`), and a value keeps its override (`target.dtype=…`).
    With `experiment=…` nothing follows. A head that is in no run folder leaves the config as it is.

    Raises:
        ValueError: if the run's config would run code from outside of hass_lightning.
    """
    run = run_config(config)
    if run is None:
        return config
    given = OverridesParser.create().parse_overrides(list(overrides))
    chosen = {override.key_or_group for override in given}
    if "experiment" in chosen:
        return config
    result = config.copy()
    with open_dict(result):
        for group in FOLLOWED:
            if group in config and group in run and group not in chosen:
                _refuse_foreign(run[group], group)
                result[group] = run[group]
                if "trust_remote_code" in result[group]:
                    result[group].trust_remote_code = False  # unless the command line sets it
                _apply(result, config, (each for each in given if each.key_or_group.startswith(f"{group}.")))
    return result


def run_config(config: DictConfig) -> DictConfig | None:
    """The config of the run whose head `draft`, or the first of `drafts`, names; None if it is not in a run folder."""
    heads = [*(config.get("drafts") or []), *([config.draft] if config.get("draft") else [])]
    folder = run_folder(Path(str(heads[0])).expanduser()) if heads else None
    if folder is None:
        return None
    run = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(run, DictConfig)
    return run


def _apply(result: DictConfig, config: DictConfig, overrides: Iterable[Override]) -> None:
    """Repeat overrides of single values, which Hydra has applied to `config`."""
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            parent, _, name = key.rpartition(".")
            OmegaConf.select(result, parent).pop(name, None)
        else:
            OmegaConf.update(result, key, OmegaConf.select(config, key), force_add=True)


def followed(node: DictConfig, group: str) -> DictConfig:
    """Return a node of a run's config for instantiation.

    Raises:
        ValueError: as in `follow_run`.
    """
    _refuse_foreign(node, group)
    return node


def _refuse_foreign(node: Any, path: str) -> None:
    """Check that a config only instantiates classes of this package, because a run folder may be untrusted."""
    if OmegaConf.is_list(node):
        for number, each in enumerate(node):
            _refuse_foreign(each, f"{path}.{number}")
    if not OmegaConf.is_dict(node):
        return
    target = node.get("_target_")
    if target is not None and not str(target).startswith("hass_lightning."):
        raise ValueError(
            f"the run's config instantiates {target} ({path}), which is not part of hass_lightning: set "
            f"{path.split('.', maxsplit=1)[0]}=… on the command line."
        )
    for name in node:
        if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            _refuse_foreign(node[name], f"{path}.{name}")
