"""`hass-doctor`: find problems with a run before it starts. Accepts the overrides of `hass-train`.

    hass-doctor experiment=hass target=llama3_8b_instruct data=sharegpt
    hass-doctor draft=runs/quickstart                        # also check a saved head against the target
    hass-doctor 'benchmarks=[mt_bench,gsm8k]'                # check for their prompts in the training data

Each line is ok, a warning or an error with its fix; after an error the exit code is 1.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from hass_lightning.checks.data import (
    check_coverage,
    check_cut_answers,
    check_duplicates,
    check_leakage,
    check_truncation,
    check_usable,
    survey,
)
from hass_lightning.checks.features import check_features
from hass_lightning.checks.finding import Finding, counts, error, one_line, run_check, show
from hass_lightning.checks.head import check_head
from hass_lightning.checks.head_fits_target import (
    check_fc_bias,
    check_rope,
    check_special_tokens,
    check_target_weights,
    check_vocabulary,
)
from hass_lightning.checks.machine import (
    check_accelerator,
    check_attention,
    check_precision,
    check_target_device,
    check_threads,
    check_versions,
)
from hass_lightning.checks.overfit import check_overfit
from hass_lightning.checks.probe import check_disk, estimate_time, longest_batch, probe_step
from hass_lightning.checks.template import check_alignment, check_bos, check_end_of_turn, check_rendered, preview
from hass_lightning.commands.command import command
from hass_lightning.commands.errors import user_error
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.from_config import load_benchmark
from hass_lightning.data.order import split_validation
from hass_lightning.data.tokens import encode_conversation
from hass_lightning.runs.screen import stdout_console
from hass_lightning.target_model.model import TargetModel
from hass_lightning.training.from_config import build_module, make_trainer
from hass_lightning.training.strategy import check_trainer_config
from hass_lightning.types import Conversation, Tokens

log = logging.getLogger(__name__)


class Examination:
    """The findings so far. A failed stage is a finding, and the stages that need its result are skipped.

    A stage does what a run does (read the target, build the model, take a step), so what it raises would also end the
    run.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        """Call `function` and keep the findings in what it returns; an exception becomes an error named `name`.

        Returns:
            the return value of `function`, or None after an exception.
        """
        try:
            result = function()
        except Exception as failure:
            sentence = user_error(failure)
            if sentence is None and type(failure).__name__ == "MisconfigurationException":
                sentence = str(failure)
            log.debug("traceback of the stage %s", name, exc_info=True)
            self.findings.append(error(name, sentence or one_line(failure)))
            return None
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, list):
                self.findings += [one for one in each if isinstance(one, Finding)]
            elif isinstance(each, Finding):
                self.findings.append(each)
        return result


@command("doctor")
def main(config: DictConfig) -> dict[str, Any]:
    """Check the composed config; the findings are also in the JSON at the end."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    console, seen = stdout_console(), Examination()
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    seen.stage("machine", lambda: examine_machine(config, on_gpu))
    target: TargetModel | None = seen.stage("target", lambda: instantiate(config.target))
    if target is not None:
        seen.stage("target", lambda: examine_target(target, on_gpu))
        data = seen.stage("data", lambda: instantiate(config.data)(target=target))
        if data is not None and seen.stage("data", lambda: examine_data(config, data, console)) is not None:
            examine_model(config, data, seen, torch.device("cuda" if on_gpu else "cpu"))
        if config.draft:
            seen.stage("head", lambda: check_head(config.draft, target))
    show(seen.findings, console)
    num = counts(seen.findings)
    return {**num, "findings": [finding.line() for finding in seen.findings], "_exit_code": int(num["num_errors"] > 0)}


def examine_machine(config: DictConfig, on_gpu: bool) -> list[Finding]:
    """Check versions, accelerator and threads."""
    check_trainer_config(config.trainer)
    devices = config.trainer.devices
    num_processes = devices if isinstance(devices, int) and devices > 0 else 1
    return [
        *run_check(check_versions),
        *run_check(check_accelerator, config.trainer.accelerator),
        *run_check(check_threads, num_processes, on_gpu),
    ]


def examine_target(target: TargetModel, on_gpu: bool) -> list[Finding]:
    """Check the target."""
    return [
        *run_check(check_target_weights, target),
        *run_check(check_special_tokens, target),
        *run_check(check_attention, target),
        *run_check(check_target_device, target, on_gpu),
    ]


def examine_data(config: DictConfig, data: FeatureDataModule, console: Console) -> list[Finding]:
    """Check template, loss mask, and truncated, repeated or leaked data; print one conversation with its loss mask."""
    target = data.target
    tokenizer, ends = target.tokenizer, target.eos_token_ids
    train, validation = split_validation(data.source.load(target), data.num_validation)
    sample = random.Random(config.seed).sample(train, min(config.num_samples, len(train)))

    def encode(conversation: Conversation) -> Tokens:
        return encode_conversation(tokenizer, conversation, 10**9, ends, data.last_turn_only)

    found = survey(sample, encode)
    if found.encoded:
        console.rule("what the head learns (green)")
        console.print(preview(tokenizer, found.encoded[0][1]))
        console.rule()

    def check_leakage_here() -> list[Finding]:
        evaluation: dict[str, Sequence[Conversation]] = {"validation": validation}
        return check_leakage(train, evaluation | {name: load_benchmark(name) for name in config.benchmarks})

    check_leakage_here.__name__ = "check_leakage"
    findings = [
        *run_check(check_usable, found),
        *run_check(check_rendered, tokenizer, sample),
        *run_check(check_coverage, found),
        *run_check(check_truncation, found, data.max_length, target.max_length),
        *run_check(check_cut_answers, train),
        *run_check(check_duplicates, train),
        *run_check(check_leakage_here),
    ]
    if found.encoded:
        findings += [
            *run_check(check_alignment, tokenizer, found.encoded, data.last_turn_only),
            *run_check(check_end_of_turn, tokenizer, found.encoded, ends),
            *run_check(check_bos, tokenizer, found.encoded),
        ]
    return findings


def examine_model(config: DictConfig, data: FeatureDataModule, seen: Examination, device: torch.device) -> None:
    """Check the head, a training step, target features and predicted features, and overfit one conversation."""
    target = data.target
    tokens = seen.stage("tokens", data.tokens)
    built = tokens and seen.stage("model", lambda: build_module(config, data))
    trainer = built and seen.stage("trainer", lambda: make_trainer(config, data, [], [], built[0]))
    if not trainer:
        return
    module, coverage = built
    target = data.target  # with the layers that the head reads
    draft, train = module.draft, tokens[0]
    seen.stage("head", lambda: [
        *run_check(check_precision, trainer.precision, target.dtype, device.type == "cuda"),
        *run_check(check_vocabulary, target, draft, coverage), *run_check(check_rope, target, draft, data.max_length),
        *run_check(check_fc_bias, draft),
    ])  # fmt: skip
    num_tokens = sum(len(sequence) for part in tokens for sequence in part)
    num_parameters = sum(parameter.numel() for parameter in draft.parameters())
    run_dir = Path(config.paths.run_dir)
    seen.stage("disk", lambda: check_disk(target, num_tokens, num_parameters, data.cache_dir, run_dir))
    features = seen.stage("features", lambda: check_features(target, train, data.cache_dir, data.eight_bit_cache))
    probed = seen.stage(
        "probe_step", lambda: probe_step(module, trainer, longest_batch(target, train, data.batch_size), device)
    )
    if probed and probed[1] and features:
        mean = sum(len(sequence) for sequence in train) / len(train) * data.batch_size
        steps = trainer.max_steps * trainer.accumulate_grad_batches
        seen.stage("time", lambda: estimate_time(probed[1], steps, mean, num_tokens, features[1]))
    if config.overfit_steps:
        questions = data.validation_conversations[:8]
        with tempfile.TemporaryDirectory() as folder:

            def overfit() -> Any:
                fresh = build_module(config, data)[0]
                return check_overfit(target, fresh, questions, Path(folder), config.overfit_steps)

            seen.stage("overfit", overfit)


if __name__ == "__main__":
    main()
