"""The checkpoint from which a run starts, and whether the processes of the run can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hass_lightning.runs.files import write_whole
from hass_lightning.training.last_checkpoint import LAYOUT_FILE, find_last_checkpoint, is_whole
from hass_lightning.training.strategy import deepspeed_stage, num_processes


@dataclass(frozen=True)
class Layout:
    """Distribution of a DeepSpeed checkpoint over processes; None in a field means unknown."""

    processes: int
    stage: int | None
    precision: str | None

    @classmethod
    def of_run(cls, settings: Mapping[str, Any]) -> Layout | None:
        """Return the layout of a run with these trainer settings.

        None without DeepSpeed, whose checkpoints alone depend on the number of processes.
        """
        stage = deepspeed_stage(settings)
        return None if stage is None else cls(num_processes(settings), stage, str(settings["precision"]))

    @classmethod
    def of_checkpoint(cls, path: Path) -> Layout | None:
        """Return the layout recorded in a checkpoint folder or inferred from its file names; None for a single file."""
        if not path.is_dir():
            return None
        if (path / LAYOUT_FILE).exists():
            return cls(**json.loads((path / LAYOUT_FILE).read_text()))
        shards = list(path.glob("*/*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
        return cls(max(1, len(shards)), None if shards else 0, None)

    def write(self, folder: Path) -> None:
        """Record the layout in a checkpoint folder."""
        write_whole(folder / LAYOUT_FILE, json.dumps(asdict(self)))

    def fits(self, other: Layout) -> bool:
        """Return whether both layouts are equal in all fields that both know."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)

    def __str__(self) -> str:
        stage = "an unknown stage" if self.stage is None else f"stage {self.stage}"
        return f"DeepSpeed {stage} on {self.processes} process(es) in {self.precision or 'an unknown precision'}"


def given_checkpoint(ckpt_path: str | None) -> str | None:
    """Return the checkpoint that `ckpt_path` names: a file, a DeepSpeed folder, or a run folder (its last checkpoint).

    Raises:
        ValueError: if there is none, or if it is damaged.
    """
    if ckpt_path is None:
        return None
    path = Path(str(ckpt_path)).expanduser()
    if not path.exists():
        raise ValueError(
            f"ckpt_path={ckpt_path} does not exist: set it to a checkpoint (<run folder>/checkpoints/last.ckpt), a "
            "run folder, or null to resume from this run's own checkpoint."
        )
    if (path / "checkpoints").is_dir() or any(path.glob("last.ckpt*")):
        last = find_last_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if last is None:
            raise ValueError(
                f"ckpt_path={ckpt_path} is a folder without a complete last.ckpt: set it to another checkpoint."
            )
        return last
    if not is_whole(path):
        raise ValueError(
            f"ckpt_path={ckpt_path} is not a complete checkpoint of Lightning or DeepSpeed: set it to the last.ckpt "
            "of a run folder, or to null. init_from=<run folder> starts from the weights of a head only."
        )
    return str(path)


def refuse_other_layout(checkpoint: str | None, settings: Mapping[str, Any]) -> None:
    """Raise an error if the processes of this run cannot read a checkpoint.

    Args:
        checkpoint: the checkpoint that the run would resume from.
        settings: the trainer's settings, with `precision=auto` resolved.

    Raises:
        ValueError: naming both layouts and how to continue.
    """
    if checkpoint is None:
        return
    written, now = Layout.of_checkpoint(Path(checkpoint)), Layout.of_run(settings)
    if written == now or (written and now and written.fits(now)):
        return
    before = str(written or "one file (single process or ddp)")
    wanted = str(now or f"{num_processes(settings)} process(es) without DeepSpeed")
    run = next((parent.parent for parent in Path(checkpoint).parents if parent.name == "checkpoints"), Path("<run>"))
    raise ValueError(
        f"the checkpoint {checkpoint} was written by {before}, and this run is {wanted}: optimizer states cannot be "
        "read under another layout. Set trainer=…, trainer.devices and trainer.precision to their previous values, or "
        "start from the weights of its head only (steps, optimizer and schedules start again): ckpt_path=null "
        f"init_from={run}"
    )
