"""Everything W&B gets: settings, axes, alerts, the table of prompts, panels by depth, artifacts; offline, too.

Lightning's WandbLogger logs the curves. No other module of training knows W&B; without its logger all this is silent.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from hass_lightning.cli import is_first_process
from hass_lightning.files import write_whole
from hass_lightning.measure.records import acceptance_length, conditional_rates, survival
from hass_lightning.measure.trace import BASELINE, Record
from hass_lightning.report.answers import pieces_of
from hass_lightning.target.source import server_answers
from hass_lightning.wandb_key import has_wandb_key, wandb_server

log = logging.getLogger(__name__)
AXES = ("trainer/global_step", "compute/tokens", "compute/flops", "compute/seconds")
# how a token of an answer looks in the table: ⟦accepted⟧, ⟨the target's own where the drafts were wrong⟩, ~~rejected~~
MARKS = {"accepted": ("⟦", "⟧"), "corrected": ("⟨", "⟩"), "rejected": ("~~", "~~"), "target": ("", "")}
COLUMNS = [
    "prompt", "category", "question", "decoder", "num_tokens", "num_cycles", "acceptance_length", "seconds",
    "identical", "text", "drafted_and_accepted",
]  # fmt: skip


def wandb_settings(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What the logger of a run takes beside conf/logger: the whole config at once, and one id a run folder.

    The config is handed over when the run starts: an offline run that dies would lose it otherwise. Without a key, or
    where the server does not answer, the run is logged offline, said in one line.
    """
    offline_without_server()
    return {"config": dict(config), "id": run_id(run_dir)}


def offline_without_server() -> None:
    """W&B is offline without a key, and where its server does not answer; `WANDB_MODE` wins. Said in one line."""
    if os.environ.get("WANDB_MODE"):
        return
    server = wandb_server()
    if not has_wandb_key():
        reason = "no W&B key"
    elif not server_answers(server):
        reason = f"the W&B server {server} does not answer"
    else:
        return
    os.environ["WANDB_MODE"] = "offline"
    log.info("%s: the run is logged offline (upload it later with `wandb sync`)", reason)


def run_id(run_dir: Path) -> str:
    """One W&B id a run folder, so that a resumed run is the same run."""
    file = run_dir / "wandb_id"
    known = file.read_text().strip() if file.exists() else ""
    if not known and is_first_process():  # the others log nothing, and need no id
        known = uuid.uuid4().hex[:8]
        write_whole(file, known)
    return known


def close_wandb() -> None:
    """Close the W&B run, if there is one, whatever happened."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()


def wandb_runs(loggers: Iterable[Logger]) -> list[Any]:
    """The W&B runs among the loggers (of this process: the first rank alone has one)."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def define_axes(loggers: Iterable[Logger]) -> None:
    """Step, tokens, FLOPs and seconds as axes; best values in the summary."""
    for run in wandb_runs(loggers):
        for axis in AXES[1:]:
            run.define_metric(axis, step_metric=AXES[0], summary="max")
        run.define_metric("val/acceptance_length", step_metric=AXES[0], step_sync=True, summary="max")
        run.define_metric("val/loss", step_metric=AXES[0], step_sync=True, summary="min")


def alert(loggers: Iterable[Logger], title: str, text: str) -> None:
    """Warn in the log, and by W&B's alert (mail or Slack, once the run is online)."""
    log.warning("%s: %s", title, text)
    for run in wandb_runs(loggers):
        run.alert(title=title, text=text, level="WARN", wait_duration=300)


def marked_text(record: Record, tokenizer: Any) -> str:
    """An answer with its drafted tokens marked, see `MARKS`; neighbours of one kind share their marks."""
    parts: list[tuple[str, str]] = []
    for piece in pieces_of(record, tokenizer):
        if parts and parts[-1][0] == piece.kind:
            parts[-1] = (piece.kind, parts[-1][1] + piece.text)
        else:
            parts.append((piece.kind, piece.text))
    return "".join(f"{MARKS[kind][0]}{text}{MARKS[kind][1]}" for kind, text in parts)


def prompt_rows(records: Sequence[Record], tokenizer: Any, questions: Mapping[str, str]) -> list[list[Any]]:
    """`COLUMNS` of each prompt and decoder."""
    return [
        [
            record.prompt_id,
            record.category,
            questions.get(record.prompt_id, ""),
            record.decoder,
            record.num_tokens,
            len(record.accepted),
            acceptance_length([record]),
            record.total_seconds,
            record.identical,
            tokenizer.decode(record.token_ids),
            "" if record.decoder == BASELINE else marked_text(record, tokenizer),
        ]
        for record in records
    ]


def log_results(
    loggers: Iterable[Logger],
    run_dir: Path,
    metrics: Mapping[str, Any],
    records: Sequence[Record],
    tokenizer: Any,
    questions: Mapping[str, str],
) -> None:
    """When a run ends: final numbers in the summary, prompts and depths as tables, head and features as artifacts."""
    for run in wandb_runs(loggers):
        import wandb

        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        run.summary.update({f"final/{name}": value for name, value in numbers.items()})
        if records:
            rows = prompt_rows(records, tokenizer, questions)
            depths = depth_rows(records)
            table = wandb.Table(columns=["depth", "accept_rate", "survival"], data=depths)
            run.log(
                {
                    "decode/prompts": wandb.Table(columns=list(COLUMNS), data=rows),
                    "decode/accept_rate_by_depth": wandb.plot.line(table, "depth", "accept_rate", title="a_k by depth"),
                    "decode/survival_by_depth": wandb.plot.line(table, "depth", "survival", title="s_k by depth"),
                }
            )
        log_artifacts(run, run_dir, numbers)


def depth_rows(records: Sequence[Record]) -> list[list[float]]:
    """Depth, a_k, s_k of the speculative records."""
    own = [record for record in records if record.decoder != BASELINE]
    return [
        [depth, rate, joint]
        for depth, (rate, joint) in enumerate(zip(conditional_rates(own), survival(own), strict=True), start=1)
    ]


def log_artifacts(run: Any, run_dir: Path, metadata: Mapping[str, Any]) -> None:
    """The head as a `model`, the manifest of its features as a `dataset`.

    Lineage stands in provenance.json: `use_artifact` needs a server.
    """
    import wandb

    for kind, name, path in (
        ("model", f"draft-{run.id}", run_dir / "draft"),
        ("dataset", f"features-{run.id}", run_dir / "features.json"),
    ):
        if path.exists():
            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata) if kind == "model" else None)
            files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
            for file in files:
                artifact.add_file(str(file), policy="immutable")  # of a finished run: no second copy on the disk
            run.log_artifact(artifact)
