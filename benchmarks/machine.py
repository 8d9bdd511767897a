"""What the machine can do at best: the rates that measured times are compared with. Used by the other benchmarks."""

from time import perf_counter

import torch


def rates(dtype: torch.dtype = torch.float32, repeats: int = 5) -> dict[str, float]:
    """Operations a second of a large product, bytes a second of a copy and of a product with a vector.

    The best of `repeats`, with torch's current number of threads. A copy counts what it reads and what it writes.
    """
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 4096, dtype=dtype)
    block, other = torch.ones(1 << 25), torch.zeros(1 << 25)  # 128 MB each: no cache holds them
    matrix, vector = torch.randn(24_576, 1024).to(dtype), torch.randn(1024).to(dtype)
    work = {
        "flops": (2 * 1024 * 1024 * 4096, lambda: a @ b),
        "copy": (2 * block.nbytes, lambda: other.copy_(block)),
        "matrix_vector": (matrix.nbytes, lambda: matrix @ vector),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(repeats):
        for name, (_, run) in work.items():
            start = perf_counter()
            run()
            best[name] = min(best[name], perf_counter() - start)
    return {name: amount / best[name] for name, (amount, _) in work.items()}
