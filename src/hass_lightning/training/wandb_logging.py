"""W&B: settings, axes, alerts, the table of prompts, metrics by depth and artifacts, also offline.

Lightning's WandbLogger logs the curves. No other module of `training/` uses W&B; without its logger these functions do
nothing.
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

from hass_lightning.measure.metrics import acceptance_length, conditional_rates, survival
from hass_lightning.measure.record import BASELINE, Record
from hass_lightning.measure.token_kinds import pieces_of
from hass_lightning.runs.files import write_whole
from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE
from hass_lightning.runs.ranks import is_first_process
from hass_lightning.runs.wandb_key import has_wandb_key, wandb_server
from hass_lightning.target_model.hub import server_answers

log = logging.getLogger(__name__)
MAX_TAG = 64
AXES = ("trainer/global_step", "compute/tokens", "compute/flops", "compute/seconds")
# How the tokens of an answer are marked in the table: ⟦accepted⟧, ⟨the target's token after a rejected draft⟩,
# ~~rejected~~.
MARKS = {"accepted": ("⟦", "⟧"), "corrected": ("⟨", "⟩"), "rejected": ("~~", "~~"), "target": ("", "")}
COLUMNS = [
    "prompt", "category", "question", "decoder", "num_tokens", "num_cycles", "acceptance_length", "seconds",
    "identical", "text", "drafted_and_accepted",
]  # fmt: skip


def wandb_settings(config: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the arguments of a run's logger in addition to conf/logger: the whole config, and one id per run folder.

    The config is passed when the run starts, because an offline run that is killed would lose it otherwise. Without a
    key, or if the server does not answer, the run is logged offline, and one line says so.
    """
    offline_without_server()
    return {"config": dict(config), "id": run_id(run_dir)}


def offline_without_server() -> None:
    """Set W&B offline if there is no key or the server does not answer, and log that. `WANDB_MODE` takes precedence."""
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
    """Return the W&B id of a run folder, so that a resumed run continues the same W&B run."""
    file = run_dir / "wandb_id"
    known = file.read_text().strip() if file.exists() else ""
    if not known and is_first_process():  # the other processes log nothing
        known = uuid.uuid4().hex[:8]
        write_whole(file, known)
    return known


def close_wandb(exit_code: int = 0) -> None:
    """Close the W&B run if there is one. Any exit code other than 0 marks it as failed or preempted."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        if exit_code == REQUEUE_EXIT_CODE:
            wandb.run.mark_preempting()
        wandb.finish(exit_code=exit_code)


def wandb_place() -> str | None:
    """The address of the W&B run; of an offline one, the command that uploads it. None without a run."""
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    if run is None:
        return None
    return str(run.url) if run.url else f"wandb sync {os.path.relpath(Path(run.dir).parent)}"


def wandb_disabled() -> bool:
    """Return whether the environment disables W&B: WANDB_DISABLED=true, or WANDB_MODE=disabled."""
    named = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return named or os.environ.get("WANDB_MODE", "").lower() == "disabled"


def short_tags(tags: Iterable[Any]) -> list[str]:
    """Return the tags as W&B accepts them: 1 to 64 characters, longer ones truncated."""
    texts = [str(tag) for tag in tags if tag not in (None, "")]
    return [text if len(text) <= MAX_TAG else text[: MAX_TAG - 1] + "…" for text in texts]


def wandb_runs(loggers: Iterable[Logger]) -> list[Any]:
    """Return the W&B runs of the loggers (only the first process has one)."""
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]


def define_axes(loggers: Iterable[Logger]) -> None:
    """Define step, tokens, FLOPs and seconds as axes, and best values for the summary."""
    for run in wandb_runs(loggers):
        for axis in AXES[1:]:
            run.define_metric(axis, step_metric=AXES[0], summary="max")
        run.define_metric("val/acceptance_length", step_metric=AXES[0], step_sync=True, summary="max")
        run.define_metric("val/loss", step_metric=AXES[0], step_sync=True, summary="min")


def alert(loggers: Iterable[Logger], title: str, text: str) -> None:
    """Warn in the log and by a W&B alert (mail or Slack if the run is online)."""
    log.warning("%s: %s", title, text)
    for run in wandb_runs(loggers):
        run.alert(title=title, text=text, level="WARN", wait_duration=300)


def marked_text(record: Record, tokenizer: Any) -> str:
    """Return an answer with its draft tokens marked as in `MARKS`; adjacent tokens of one kind share their marks."""
    parts: list[tuple[str, str]] = []
    for piece in pieces_of(record, tokenizer):
        if parts and parts[-1][0] == piece.kind:
            parts[-1] = (piece.kind, parts[-1][1] + piece.text)
        else:
            parts.append((piece.kind, piece.text))
    return "".join(f"{MARKS[kind][0]}{text}{MARKS[kind][1]}" for kind, text in parts)


def prompt_rows(records: Sequence[Record], tokenizer: Any, questions: Mapping[str, str]) -> list[list[Any]]:
    """Return the `COLUMNS` of each prompt and decoder."""
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
    """Log the results of a run: metrics in the summary, tables of prompts and depths, and artifacts."""
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
    """Return depth, a_k and s_k of the speculative records."""
    own = [record for record in records if record.decoder != BASELINE]
    return [
        [depth, rate, joint]
        for depth, (rate, joint) in enumerate(zip(conditional_rates(own), survival(own), strict=True), start=1)
    ]


def log_artifacts(run: Any, run_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Log the head as a `model` artifact and the manifest of its features as a `dataset`.

    Lineage is in provenance.json, because `use_artifact` needs a server.
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
                artifact.add_file(str(file), policy="immutable")  # the files are final, so no second copy is needed
            run.log_artifact(artifact)
