"""Estimate of disk, memory and hours of a run, computed from the sizes of the target without loading it.

P_t parameters of the target, P_d of the draft head, D hidden, V vocabulary, J alignment steps. A multiply-add counts as
two operations; attention scores and everything of order D are neglected (a few percent).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

GB = 1e9


@dataclass(frozen=True)
class Device:
    """Performance of a processor: bf16 operations per second (dense, from the data sheet) and memory in bytes."""

    flops: float
    memory: float


DEVICES = {  # from the manufacturers' data sheets
    "a100_40gb": Device(312e12, 40 * GB),
    "a100_80gb": Device(312e12, 80 * GB),
    "h100_80gb": Device(989e12, 80 * GB),
    "h200_141gb": Device(989e12, 141 * GB),
    "l40s_48gb": Device(362e12, 48 * GB),
    "rtx4090_24gb": Device(165e12, 24 * GB),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaMA-like target, named as in its config.json (`head_dim` null: hidden_size / heads)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Sizes:
        """Read the sizes from the content of a config.json.

        Raises:
            ValueError: if a size is missing.
        """
        heads = config.get("num_attention_heads")
        values: dict[str, Any] = {"num_key_value_heads": heads} | {k: v for k, v in config.items() if v is not None}
        try:
            return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        except TypeError as error:
            raise ValueError(f"target.sizes or its config.json lacks sizes of a LLaMA-like model: {error}.") from error

    @classmethod
    def read_folder(cls, folder: str | Path) -> Sizes:
        """Read the sizes from the config.json of a model folder."""
        return cls.read(json.loads((Path(folder) / "config.json").read_text()))

    def _layer(self) -> int:
        """Return the parameters of one decoder layer without its norms: q, k, v, o and the three MLP weights."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        attention = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (head_dim * attention + 3 * self.intermediate_size)

    @property
    def target_parameters(self) -> int:
        """Return P_t, including the embedding and the LM head (counted once if tied)."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return ends + self.num_hidden_layers * (self._layer() + 2 * self.hidden_size) + self.hidden_size

    @property
    def draft_parameters(self) -> int:
        """Return P_d: fc and one layer with its single norm."""
        return 2 * self.hidden_size**2 + self._layer() + self.hidden_size


@dataclass(frozen=True)
class Workload:
    """Size of a training workload.

    Args:
        num_tokens: number of tokens of all conversations.
        num_rows: number of loss positions among them.
        epochs: number of passes over the data.
        depth: number of alignment steps.
        batch_tokens: number of padded tokens per process and step.
        processes: number of processes.
        extractors: number of processes that run the target. None: all; 1 if it is partitioned over all devices.
        draft_vocab: number of rows of the LM head that the loss uses; 0: all.
        draft_parameters: number of parameters of the head. None: those of an EAGLE head.
        feature_layers: number of hidden states in a feature beside the last one.
        stage: ZeRO stage; None without DeepSpeed.
        target_bytes: bytes per value of the target.
        trained_bytes: bytes per value in a training step (2 under bf16-mixed).
    """

    num_tokens: int
    num_rows: int
    epochs: float = 1.0
    depth: int = 3
    batch_tokens: int = 8 * 2048
    processes: int = 1
    extractors: int | None = None
    draft_vocab: int | None = None
    draft_parameters: int | None = None
    feature_layers: int = 0
    stage: int | None = None
    target_bytes: int = 2
    trained_bytes: int = 2


def feature_bytes(sizes: Sizes, num_tokens: int, value_bytes: int = 2, feature_layers: int = 0) -> int:
    """Return the disk size of the features: D values per hidden state, two ids and one mask value per token."""
    return num_tokens * ((feature_layers + 1) * sizes.hidden_size * value_bytes + 9)


def extraction_memory(sizes: Sizes, value_bytes: int = 2, batch_tokens: int = 4096) -> float:
    """Return the bytes of the target and of one forward pass over `batch_tokens`.

    The largest activations are gate, up and their product in one MLP.
    """
    widest = 3 * sizes.intermediate_size + 4 * sizes.hidden_size
    return value_bytes * (sizes.target_parameters + batch_tokens * widest)


def training_memory(sizes: Sizes, work: Workload, chunk_rows: int = 1024) -> float:
    """Return the bytes of one training process.

    The sum of the head's state, the target's embedding and LM head, the activations of J steps, and one loss chunk.
    Without DeepSpeed a parameter takes 16 bytes (value, gradient and two moments in float32). ZeRO partitions the
    moments and a float32 master copy from stage 1, the gradients from stage 2, and the parameters from stage 3.
    """
    value, shard = work.trained_bytes, max(1, work.processes)
    if work.stage is None:
        state: float = 16
    else:
        master = 12 / shard if work.stage >= 1 else 12
        state = value / (shard if work.stage == 3 else 1) + value / (shard if work.stage >= 2 else 1) + master
    vocab = work.draft_vocab or sizes.vocab_size
    ends = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)
    ends += vocab * sizes.hidden_size if work.draft_vocab else 0  # the selected rows are a copy
    a_token = 12 * sizes.hidden_size + 4 * sizes.intermediate_size  # what one step keeps for the backward pass
    activations = work.batch_tokens * (work.depth * a_token + 3 * sizes.hidden_size)
    chunk = 4 * min(chunk_rows, work.batch_tokens) * vocab  # logits of head and target, softmax, gradient; float32
    return state * (work.draft_parameters or sizes.draft_parameters) + value * (ends + activations) + 4 * chunk


def extraction_flops(sizes: Sizes, work: Workload) -> float:
    """Return the operations of the target over all tokens and of its LM head over the loss positions."""
    layers = sizes.target_parameters - sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)
    return 2.0 * (layers * work.num_tokens + sizes.vocab_size * sizes.hidden_size * work.num_rows)


def training_flops(sizes: Sizes, work: Workload) -> float:
    """Return the operations of all epochs: forward and backward of the head at J depths, logits of head and target."""
    head = 6.0 * (work.draft_parameters or sizes.draft_parameters) * work.depth * work.num_tokens
    logits = 2.0 * (work.draft_vocab or sizes.vocab_size) * sizes.hidden_size * (1 + 2 * work.depth) * work.num_rows
    return work.epochs * (head + logits)


def plan(sizes: Sizes, work: Workload, flops: float) -> dict[str, float]:
    """Return disk, memory and hours of a workload on devices with `flops` effective operations per second each."""
    return {
        "target_parameters": sizes.target_parameters,
        "draft_parameters": work.draft_parameters or sizes.draft_parameters,
        "num_tokens": work.num_tokens,
        "num_rows": work.num_rows,
        "target_gb": work.target_bytes * sizes.target_parameters / GB,  # per process, unless target.head_only
        "disk_gb": feature_bytes(sizes, work.num_tokens, work.target_bytes, work.feature_layers) / GB,
        "extraction_memory_gb": extraction_memory(sizes, work.target_bytes) / GB,
        "extraction_hours": extraction_flops(sizes, work) / flops / (work.extractors or work.processes) / 3600,
        "training_memory_gb": training_memory(sizes, work) / GB,
        "training_hours": training_flops(sizes, work) / flops / work.processes / 3600,
    }
