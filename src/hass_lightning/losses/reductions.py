"""Operations of the loss over [R, Vd] between its two matrix products: two reductions and their gradient.

`EagerPasses` runs them as separate operations. `CompiledPasses` runs one compiled function for the reductions and one
for the gradient (torch.compile: C++ on a CPU, Triton on a GPU), which read the logits in the dtype of the matrix
product. Both write into one buffer that all chunks and steps reuse, because a new buffer costs page faults on a CPU.
Shapes: R loss positions, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hass_lightning.losses.terms import TargetRows

log = logging.getLogger(__name__)

# Number of logits computed in a whole run above which compiling (up to half a minute) saves time: (CPU, GPU).
WORTH_COMPILING = (3e10, 1e12)


class Passes(Protocol):
    """Reductions of the logits z [R, Vd] of one chunk and step, given the target's probabilities p [R, Vd]."""

    def log_normalizer(self) -> Tensor:
        """Log-normalizer log Σ_v exp z_v [R]."""
        ...

    def expected_logit(self) -> Tensor:
        """Expected logit Σ_v p_v z_v [R]."""
        ...

    def hits(self, wanted: Tensor) -> Tensor:
        """Whether the largest logit is at index `wanted` [R], as bool [R]."""
        ...

    def gradient(self, to_normalizer: Tensor | None, to_expected: Tensor | None) -> Tensor:
        """Gradient of the logits [R, Vd], given the gradients [R] of the two reductions.

        The caller may modify the result. Called once, after all other methods.
        """
        ...


class EagerPasses:
    """Eager implementation that writes into `scratch` [R, Vd]; the reference for the compiled one."""

    def __init__(self, logits: Tensor, target: TargetRows, scratch: Tensor):
        self.logits, self.target, self.scratch = logits, target, scratch
        self._sum: Tensor | None = None  # [R], of exp(z - max z), which is in the scratch

    def log_normalizer(self) -> Tensor:
        """Log-normalizer [R]; 20 times faster than `torch.logsumexp` on a CPU."""
        highest = self.logits.amax(-1, keepdim=True)
        self._sum = torch.sub(self.logits, highest, out=self.scratch).exp_().sum(-1)
        return self._sum.log() + highest.squeeze(-1)

    def expected_logit(self) -> Tensor:
        """Expected logit [R], as a batched matrix product that allocates no [R, Vd] tensor."""
        return torch.bmm(self.target.probs.unsqueeze(1), self.logits.unsqueeze(2)).flatten()

    def hits(self, wanted: Tensor) -> Tensor:
        """Whether `wanted` is the argmax; the first of equal logits counts."""
        return self.logits.argmax(-1) == wanted

    def gradient(self, to_normalizer: Tensor | None, to_expected: Tensor | None) -> Tensor:
        """Gradient of the logits [R, Vd], written to `scratch`."""
        if to_normalizer is not None and self._sum is not None:
            total = self.scratch.mul_((to_normalizer / self._sum).unsqueeze(-1))
        else:
            total = self.scratch.zero_()
        if to_expected is not None:
            total.addcmul_(self.target.probs, to_expected.unsqueeze(-1))
        return total


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _reductions(logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return max z, Σ exp(z - max z) and Σ p z, each [R]."""
    z = _wide(logits)
    highest = z.amax(-1)
    return highest, (z - highest.unsqueeze(-1)).exp().sum(-1), (_wide(probs) * z).sum(-1)


def _gradient(
    out: Tensor, logits: Tensor, highest: Tensor, to_sum: Tensor, probs: Tensor, to_expected: Tensor
) -> Tensor:
    """Write `to_sum` exp(z - max z) + `to_expected` p to `out`."""
    exponentials = (_wide(logits) - highest.unsqueeze(-1)).exp()
    return out.copy_(exponentials * to_sum.unsqueeze(-1) + _wide(probs) * to_expected.unsqueeze(-1))


@lru_cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_reductions, dynamic=True), torch.compile(_gradient, dynamic=True)


class CompiledPasses:
    """Compiled implementation; the logits stay in the dtype of the matrix product."""

    def __init__(self, logits: Tensor, target: TargetRows, scratch: Tensor, compiler: Compiler):
        self.logits, self.scratch, self.compiler = logits, scratch, compiler
        self.probs = target.probs_in(logits.dtype)
        self.highest, self._sum, self._expected = compiler.reductions(logits, self.probs)

    def log_normalizer(self) -> Tensor:
        """Log-normalizer [R], from the sums computed at construction."""
        return self._sum.log() + self.highest

    def expected_logit(self) -> Tensor:
        """Expected logit [R], computed at construction."""
        return self._expected

    def hits(self, wanted: Tensor) -> Tensor:
        """Whether the logit at `wanted` equals the maximum; each of equal logits (frequent in bf16) counts."""
        return self.logits.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1) == self.highest

    def gradient(self, to_normalizer: Tensor | None, to_expected: Tensor | None) -> Tensor:
        """Gradient of the logits [R, Vd], written to `scratch`."""
        zeros = torch.zeros_like(self._sum)
        to_sum = zeros if to_normalizer is None else to_normalizer / self._sum
        to_expected = zeros if to_expected is None else to_expected
        out = self.scratch.data  # not a view: its size would be compared with that of its base at each call
        return self.compiler.gradient(out, self.logits, self.highest, to_sum, self.probs, to_expected)


class Compiler:
    """Decides whether the passes are compiled, and falls back to eager execution if compilation fails.

    Args:
        mode: `auto` compiles for runs that are long enough (`decide`), and logs a warning and runs eagerly if
            compilation fails. True always compiles, False never does.

    Raises:
        ValueError: if `mode` is none of these.
    """

    def __init__(self, mode: Literal["auto"] | bool = "auto"):
        if mode not in ("auto", True, False):
            raise ValueError(f"model.loss.compile={mode} is none of auto, true, false.")
        self.mode = mode
        self.on = mode is True

    def decide(self, num_elements: float, device: torch.device) -> None:
        """With mode `auto`, compile if the run computes enough logits for it to save time.

        The decision depends on the config alone, so that a resumed run makes the same one.
        """
        if self.mode == "auto":
            self.on = num_elements >= WORTH_COMPILING[device.type != "cpu"]

    def reductions(self, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Call `_reductions`, compiled if `on`."""
        return self._call(0, _reductions, logits, probs)

    def gradient(self, *arguments: Tensor) -> Tensor:
        """Call `_gradient`, compiled if `on`."""
        return self._call(1, _gradient, *arguments)

    def _call(self, number: int, plain: Callable[..., Any], *arguments: Tensor) -> Any:
        if self.on:
            try:
                with torch.no_grad():  # a change of grad mode would trigger a recompilation
                    return _compiled()[number](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
                if self.mode is True:
                    raise ValueError(
                        f"model.loss.compile=true: torch.compile failed ({first_line}). It needs a C++ compiler (g++) "
                        "on a CPU, Triton on a GPU; set model.loss.compile=auto or false to run without it."
                    ) from error
                log.warning("the loss is not compiled and is computed eagerly: %s", first_line)
                self.on = False
        return plain(*arguments)
