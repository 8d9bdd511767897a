"""Rehearsal of the end of a run before its first step, to find errors before hours of training."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.draft import load_draft, save_draft
from hass_lightning.measure.record import Record
from hass_lightning.training.callbacks import DecodingBenchmark, decode_metrics, head_notes
from hass_lightning.training.module import HassModule
from hass_lightning.training.wandb_logging import depth_rows, prompt_rows

log = logging.getLogger(__name__)
NEW_TOKENS = 4


def rehearse_end(
    module: HassModule,
    data: FeatureDataModule,
    benchmark: DecodingBenchmark | None,
    run_dir: Path,
    write_report: Callable[..., object],
) -> float:
    """Save the untrained head, load it, decode one question with it and write the report, in a temporary folder.

    Nothing is logged, the state of the run's random number generators is restored, and the folder is removed.

    Args:
        module: the module with its initial head.
        data: the data.
        benchmark: the final measurement; None if nothing is decoded.
        run_dir: the run folder.
        write_report: `run_report`.

    Returns:
        the duration in seconds.

    Raises:
        ValueError, OSError: the error that would have been raised after training.
    """
    started = time.perf_counter()
    target = data.target
    scratch = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=run_dir))
    try:
        # hides the progress bar and the table of the report
        with isolate_rng(), contextlib.redirect_stderr(io.StringIO()):
            saved_to = save_draft(scratch / "draft", module.draft, module.token_ids, head_notes(target, module, 0))
            rows: list[dict[str, Any]] = []
            records: list[Record] = []
            if benchmark is not None:
                brief = copy.copy(benchmark)
                brief.num_prompts, brief.max_new_tokens, brief.num_checked = 1, NEW_TOKENS, 0
                shortest = min(data.validation_conversations, key=lambda conversation: len(conversation.question))
                rows, records, _ = brief.measure(
                    target, load_draft(saved_to), [shortest], records_path=scratch / "records.jsonl"
                )
                decode_metrics(rows, records)
                prompt_rows(records, target.tokenizer, {shortest.id: shortest.question})
                depth_rows(records)
            questions = {c.id: c.question for c in data.validation_conversations}
            write_report(scratch, rows, records, tokenizer=target.tokenizer, prompts=questions)
    except Exception:
        log.error("the rehearsal of the end of the run failed, so nothing was trained:")
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return time.perf_counter() - started
