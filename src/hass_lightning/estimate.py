"""What a run will take: disk, memory and hours, by formulas over the sizes of the target. Nothing is loaded.

P_t parameters of the target, P_d of the draft head, D hidden, V vocabulary, J alignment steps. Multiplications and
additions are counted as two operations; attention scores and everything of order D are left out (a few percent).
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
    """What a processor can do: bf16 operations a second (dense, as its maker states them), bytes of memory."""

    flops: float
    memory: float


DEVICES = {  # from the makers' data sheets
    "a100_40gb": Device(312e12, 40 * GB),
    "a100_80gb": Device(312e12, 80 * GB),
    "h100_80gb": Device(989e12, 80 * GB),
    "h200_141gb": Device(989e12, 141 * GB),
    "l40s_48gb": Device(362e12, 48 * GB),
    "rtx4090_24gb": Device(165e12, 24 * GB),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a LLaMA-like target, as its config.json names them (`head_dim` null: hidden_size / heads)."""

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
        """From the content of a config.json.

        Raises:
            ValueError: a size is missing.
        """
        heads = config.get("num_attention_heads")
        values: dict[str, Any] = {"num_key_value_heads": heads} | {k: v for k, v in config.items() if v is not None}
        try:
            return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        except TypeError as error:
            raise ValueError(f"target.sizes or its config.json lacks sizes of a LLaMA-like model: {error}.") from error

    @classmethod
    def read_folder(cls, folder: str | Path) -> Sizes:
        """From the config.json of a model folder."""
        return cls.read(json.loads((Path(folder) / "config.json").read_text()))

    def _layer(self) -> int:
        """Parameters of one decoder layer without its norms: q, o, k, v, and the three of the MLP."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        attention = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (head_dim * attention + 3 * self.intermediate_size)

    @property
    def target_parameters(self) -> int:
        """P_t, both ends counted (once if tied)."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return ends + self.num_hidden_layers * (self._layer() + 2 * self.hidden_size) + self.hidden_size

    @property
    def draft_parameters(self) -> int:
        """P_d: fc, one layer, its one norm."""
        return 2 * self.hidden_size**2 + self._layer() + self.hidden_size


@dataclass(frozen=True)
class Workload:
    """What is to be done with a target.

    Args:
        num_tokens: of all conversations. num_rows: of them trained on (marked). epochs: passes over them.
        depth: alignment steps. batch_tokens: padded tokens of one process and step. processes: in all. extractors: of
        them, run the target (None: all; 1 where it is spread over all devices).
        draft_vocab: rows of the LM head that the loss reads. stage: of ZeRO, None without DeepSpeed.
        target_bytes: of one target value. trained_bytes: of one value in a step (2 under bf16-mixed).
    """

    num_tokens: int
    num_rows: int
    epochs: float = 1.0
    depth: int = 3
    batch_tokens: int = 8 * 2048
    processes: int = 1
    extractors: int | None = None
    draft_vocab: int | None = None
    stage: int | None = None
    target_bytes: int = 2
    trained_bytes: int = 2


def feature_bytes(sizes: Sizes, num_tokens: int, value_bytes: int = 2) -> int:
    """Disk of the features: D values, two ids and a mask a token (data/features.py, bytes_per_token)."""
    return num_tokens * (sizes.hidden_size * value_bytes + 9)


def extraction_memory(sizes: Sizes, value_bytes: int = 2, batch_tokens: int = 4096) -> float:
    """Bytes of the target and of one forward over `batch_tokens` (widest: gate, up and product of one MLP)."""
    widest = 3 * sizes.intermediate_size + 4 * sizes.hidden_size
    return value_bytes * (sizes.target_parameters + batch_tokens * widest)


def training_memory(sizes: Sizes, work: Workload, chunk_rows: int = 1024) -> float:
    """Bytes of one training process: the head's state, the borrowed ends, activations of J steps, one loss chunk.

    Without DeepSpeed a parameter takes 16 bytes (value, gradient and two moments in float32). Under ZeRO the moments
    and a float32 master are split from stage 1 on, the gradients from 2, the parameters from 3.
    """
    value, shard = work.trained_bytes, max(1, work.processes)
    if work.stage is None:
        state: float = 16
    else:
        master = 12 / shard if work.stage >= 1 else 12
        state = value / (shard if work.stage == 3 else 1) + value / (shard if work.stage >= 2 else 1) + master
    vocab = work.draft_vocab or sizes.vocab_size
    ends = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)
    ends += vocab * sizes.hidden_size if work.draft_vocab else 0  # the kept rows are a copy
    a_token = 12 * sizes.hidden_size + 4 * sizes.intermediate_size  # what one step keeps for the backward
    activations = work.batch_tokens * (work.depth * a_token + 3 * sizes.hidden_size)
    chunk = 4 * min(chunk_rows, work.batch_tokens) * vocab  # logits of both, their softmax, their gradient; in float32
    return state * sizes.draft_parameters + value * (ends + activations) + 4 * chunk


def extraction_flops(sizes: Sizes, work: Workload) -> float:
    """Operations of the target over all tokens, and of its LM head over the marked rows."""
    layers = sizes.target_parameters - sizes.vocab_size * sizes.hidden_size * (1 if sizes.tie_word_embeddings else 2)
    return 2.0 * (layers * work.num_tokens + sizes.vocab_size * sizes.hidden_size * work.num_rows)


def training_flops(sizes: Sizes, work: Workload) -> float:
    """Operations of all epochs: forward and backward of the head at J depths; its and the target's logits."""
    head = 6.0 * sizes.draft_parameters * work.depth * work.num_tokens
    logits = 2.0 * (work.draft_vocab or sizes.vocab_size) * sizes.hidden_size * (1 + 2 * work.depth) * work.num_rows
    return work.epochs * (head + logits)


def plan(sizes: Sizes, work: Workload, flops: float) -> dict[str, float]:
    """Disk, memory and hours of a workload on devices that each do `flops` useful operations a second."""
    return {
        "target_parameters": sizes.target_parameters,
        "draft_parameters": sizes.draft_parameters,
        "num_tokens": work.num_tokens,
        "num_rows": work.num_rows,
        "target_gb": work.target_bytes * sizes.target_parameters / GB,  # in each process, unless target.head_only
        "disk_gb": feature_bytes(sizes, work.num_tokens, work.target_bytes) / GB,
        "extraction_memory_gb": extraction_memory(sizes, work.target_bytes) / GB,
        "extraction_hours": extraction_flops(sizes, work) / flops / (work.extractors or work.processes) / 3600,
        "training_memory_gb": training_memory(sizes, work) / GB,
        "training_hours": training_flops(sizes, work) / flops / work.processes / 3600,
    }
