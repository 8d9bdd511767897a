"""Peak rates of the machine, and measurement of time and memory, for the other benchmarks."""

import ctypes
import gc
from pathlib import Path
from time import perf_counter

import torch


def now(device: torch.device | str = "cpu") -> float:
    """Return the clock in seconds, after synchronizing a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class Memory:
    """Resident memory of this process (Linux), or allocated memory of a GPU, in MB."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def _status(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024

    def forget_peak(self) -> float:
        """Release free memory, reset the peak and return the memory in use."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> float:
        """Return the peak since `forget_peak`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return self._status("VmHWM")


def rounded(value):
    """Round every number of a nested result to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def rates(dtype: torch.dtype = torch.float32, repeats: int = 5, device: torch.device | str = "cpu") -> dict[str, float]:
    """Measure FLOP/s of a large matrix product, and bytes/s of a copy and of a matrix-vector product.

    Best of `repeats`, with torch's current number of threads. A copy counts the bytes read and written.
    """
    where = {"dtype": dtype, "device": device}
    a, b = torch.randn(1024, 1024, **where), torch.randn(1024, 4096, **where)
    block, other = torch.ones(1 << 25, device=device), torch.zeros(1 << 25, device=device)  # 128 MB each: uncached
    matrix, vector = torch.randn(24_576, 1024, **where), torch.randn(1024, **where)
    work = {
        "flops": (2 * 1024 * 1024 * 4096, lambda: a @ b),
        "copy": (2 * block.nbytes, lambda: other.copy_(block)),
        "matrix_vector": (matrix.nbytes, lambda: matrix @ vector),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(repeats):
        for name, (_, run) in work.items():
            start = now(device)
            run()
            best[name] = min(best[name], now(device) - start)
    return {name: amount / best[name] for name, (amount, _) in work.items()}
