"""Choice of the fastest kernel to multiply few rows by a frozen weight, measured once per machine, shape and dtype.

The default CPU kernel repacks the whole weight at every call. For the few rows of a decoding step, this takes longer
than the multiplication. oneDNN can multiply by a copy that is packed once. Which is faster depends on the processor,
dtype, shape and number of rows, so it is timed when a weight is first used (about 0.5 s per shape; longer while other
processes disturb the timing). The choice is stored in the cache folder, so that later runs on the same machine use the
same kernels and round the same way.
Shapes: I inputs, O outputs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hass_lightning.runs.files import write_whole
from hass_lightning.target_model.source import cache_root

log = logging.getLogger(__name__)

ROW_CLASSES = (1, 4, 16, 64)  # measured numbers of rows; other numbers use the next larger one
SMALLEST = 1 << 20  # bytes: smaller weights stay in the processor's caches, where all kernels are fast
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REQUIRED_GAIN = 0.95  # maximum time relative to the plain kernel, because a packed copy takes memory
AGREEMENT = 1.2  # a kernel's time is reliable when its two shortest runs differ by less than this factor

Mode = Literal["auto"] | bool
_mode: Mode = "auto"
_known: dict[str, Choice] = {}
_measure_again = True  # whether stored measurements that other processes disturbed are repeated


@dataclass(frozen=True)
class Choice:
    """How a weight [O, I] is stored and multiplied.

    Attributes:
        inputs_first: the plain weight is stored as [I, O].
        packed: the values of ROW_CLASSES for which the packed copy is used.
    """

    inputs_first: bool = False
    packed: tuple[int, ...] = ()

    @property
    def always_packed(self) -> bool:
        """Whether the packed copy is used for every number of rows."""
        return self.packed == ROW_CLASSES

    def takes_packed(self, num_rows: int) -> bool:
        """Whether the packed copy is used for `num_rows` rows."""
        return next((size for size in ROW_CLASSES if num_rows <= size), None) in self.packed


def set_mode(mode: Any) -> None:
    """Set `target.packed` for this process.

    Args:
        mode: `auto` (measure), True (always pack) or False (never pack).

    Raises:
        ValueError: if `mode` is none of these.
    """
    global _mode  # noqa: PLW0603
    if mode not in ("auto", True, False):
        raise ValueError(f"target.packed={mode} is none of auto, true, false.")
    _mode = mode


def keep_disturbed() -> None:
    """Also use stored measurements that other processes disturbed. A chat does this to start sooner."""
    global _measure_again  # noqa: PLW0603
    _measure_again = False


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack weights of `dtype` on this processor (bf16 needs AVX-512 or AMX)."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        pack(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:
        return False
    return True


def pack(weight: Tensor) -> Tensor:
    """Return oneDNN's packed copy of `weight` [O, I]; its `to_dense` unpacks it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x Wᵀ + b` with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def choose(weight: Tensor, reorder: bool = False) -> Choice:
    """Choose the kernels for `weight` [O, I]; measures if there is no stored choice for its shape and dtype.

    Args:
        weight: [O, I].
        reorder: whether the plain weight may be stored inputs first.

    Raises:
        ValueError: if `target.packed=true` and this processor cannot pack the dtype.
    """
    if weight.device.type != "cpu" or _mode is False or weight.dtype not in DTYPES:
        return Choice()
    if not can_pack(weight.dtype):
        if _mode is True:
            raise ValueError(
                f"target.packed=true: this processor cannot pack weights of {weight.dtype}. Set target.packed=auto, or "
                "another target.dtype."
            )
        return Choice()
    if _mode is True:
        return Choice(packed=ROW_CLASSES)
    if weight.nbytes < SMALLEST:
        return Choice()
    key = f"{_machine()}, {weight.dtype}, {weight.shape[0]} x {weight.shape[1]}{' in either order' * reorder}"
    if key not in _known:
        _known.update(_read())
    if key not in _known:
        _known[key], reliable = _measure(weight, reorder)
        _write(key, reliable)
    return _known[key]


def _machine() -> str:
    """Return the part of the key that identifies the processor, number of threads and torch version."""
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@lru_cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    names = (found.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return " ".join([*names, torch.backends.cpu.get_cpu_capability()])


def _measure(weight: Tensor, reorder: bool) -> tuple[Choice, bool]:
    """Time the kernels with this weight; return the choice and whether all times are reliable."""
    plain, packed = weight.detach(), pack(weight)
    reordered = plain.T.contiguous().T if reorder and weight.shape[0] > weight.shape[1] else None
    chosen, inputs_first, reliable, report = [], False, True, []
    with torch.inference_mode():
        for size in ROW_CLASSES:
            x = torch.ones(size, weight.shape[1], dtype=weight.dtype)
            kernels: dict[str, Callable[[], Tensor]] = {
                "packed": partial(multiply_packed, x, packed),
                "plain": partial(F.linear, x, plain),
            }
            if size == 1 and reordered is not None:
                kernels["inputs first"] = partial(F.linear, x, reordered)
            seconds, agree = _best_seconds(kernels, _evict_caches if weight.nbytes < 1 << 25 else None)
            reliable = reliable and agree
            packed_seconds = seconds.pop("packed")
            fastest = min(seconds, key=seconds.__getitem__)
            if size == 1:
                inputs_first = fastest == "inputs first"
            if packed_seconds <= REQUIRED_GAIN * seconds[fastest]:
                chosen.append(size)
            report.append(f"{size}: {seconds[fastest] / packed_seconds:.2f}")
    log.info("weights of %s in %s, packed over plain by rows: %s", tuple(weight.shape), weight.dtype, ", ".join(report))
    if not reliable:
        log.info(
            "other processes disturbed this measurement; the next training or benchmark repeats it "
            "(target.packed=true|false sets it)"
        )
    inputs_first = inputs_first and 1 not in chosen
    return Choice(inputs_first, tuple(chosen)), reliable


def _best_seconds(
    kernels: dict[str, Callable[[], Tensor]], before: Callable[[], Any] | None, limit: float = 3.0
) -> tuple[dict[str, float], bool]:
    """Time interleaved runs of each kernel after a warm-up, until the two shortest runs of each agree.

    Args:
        kernels: functions without arguments.
        before: called before each run, untimed.
        limit: seconds after which the measurement ends in any case.

    Returns:
        The shortest time of each kernel in seconds, and whether the two shortest runs of each agree.
    """
    times: dict[str, list[float]] = {name: [] for name in kernels}
    begun, agree = perf_counter(), False
    for run in kernels.values():
        run()  # warm-up
    while not agree or (len(times["plain"]) < 7 and perf_counter() - begun < 0.3):
        for name, run in kernels.items():
            if before is not None:
                before()
            start = perf_counter()
            run()
            times[name].append(perf_counter() - start)
        shortest = [sorted(each)[:2] for each in times.values()]
        agree = all(len(each) == 2 and each[1] < AGREEMENT * each[0] for each in shortest)
        if perf_counter() - begun > limit:
            break
    return {name: min(each) for name, each in times.items()}, agree


@lru_cache(maxsize=1)
def _block() -> Tensor:
    return torch.empty(1 << 26, dtype=torch.uint8)


def _evict_caches() -> None:
    """Write 64 MB to evict the weight from the caches, as the other weights of a decoding step do."""
    _block().zero_()


def _file() -> Path:
    return cache_root() / "kernels.json"


def _read() -> dict[str, Choice]:
    stored = _stored()
    return {key: choice for key, (choice, reliable) in stored.items() if reliable or not _measure_again}


def _stored() -> dict[str, tuple[Choice, bool]]:
    """The choices in the file, and whether their measurement was reliable."""
    try:
        return {
            key: (Choice(value["inputs_first"], tuple(value["packed"])), not value.get("disturbed", False))
            for key, value in json.loads(_file().read_text()).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # missing or unreadable: measured again


def _write(key: str, reliable: bool) -> None:
    try:
        stored = _stored() | {key: (_known[key], reliable)}
        entries = {
            each: asdict(choice) | ({} if good else {"disturbed": True}) for each, (choice, good) in stored.items()
        }
        write_whole(_file(), json.dumps(entries, indent=1))
    except OSError as error:
        log.debug("%s was not written: %s", _file(), error)  # the cache folder is read-only: measured again
