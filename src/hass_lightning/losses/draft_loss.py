"""Loss of all alignment steps, computed in chunks of loss positions.

No [R, Vd] tensor outlives its chunk. The gradients of the features, and of the LM head if it is trained, are computed
chunk by chunk in the forward pass and returned unchanged in the backward pass.
Shapes: R loss positions, D hidden, J steps, Vd draft vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hass_lightning.losses.chunk import Chunk
from hass_lightning.losses.counted import CountedRows
from hass_lightning.losses.reductions import CompiledPasses, Compiler, EagerPasses, Passes
from hass_lightning.losses.terms import LossTerm, TargetRows
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary

# Maximum size of one [R, Vd] tensor on (CPU, other devices). malloc returns blocks of 32 MB or more to the
# operating system when they are freed, and the page faults of allocating them again cost more than the computation.
CHUNK_BYTES = (24 << 20, 256 << 20)


@dataclass
class LossOutput:
    """Total loss (with gradient) and the values to log."""

    total: Tensor  # scalar
    values: dict[str, Tensor]  # "<term>/step<j>": sum over positions, unweighted, detached
    hits: Tensor  # [J, R] bool: whether the draft's argmax equals the target's


class _KnownGradient(torch.autograd.Function):
    """Scalar whose gradients with respect to step features and parameters have already been computed."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [each.dtype for each in inputs]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        # scaled in fp32 and cast last, because a loss scale for fp16 exceeds the fp16 range
        return None, None, *[(upstream[0] * g).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]


class DraftLoss(nn.Module):
    """Weighted sum of loss terms over loss positions and alignment steps.

    Args:
        terms: loss terms by name; the name is also the metric name. Terms with weight 0 are not computed.
        chunk_rows: number of loss positions whose logits are in memory at once (about six fp32 tensors of [R, Vd]).
            None chooses it so that one such tensor takes at most CHUNK_BYTES.
        temperature: distillation temperature. Both distributions are softmax(logits / temperature) in every term. The
            weights are not rescaled (Hinton et al., arXiv 1503.02531, multiply by temperature²).
        compile: whether to use torch.compile for the operations between the two matrix products (reductions.py).

    Raises:
        ValueError: `temperature` or `chunk_rows` is out of range, or no term has a weight above 0.
    """

    def __init__(
        self,
        terms: Mapping[str, LossTerm],
        chunk_rows: int | None = None,
        temperature: float = 1.0,
        compile: Literal["auto"] | bool = "auto",
    ):
        super().__init__()
        self.compiler = Compiler(compile)
        if temperature <= 0:
            raise ValueError(f"model.loss.temperature={temperature} must be above 0; 1 changes nothing.")
        self.temperature = temperature
        if chunk_rows is not None and chunk_rows < 1:
            raise ValueError(
                f"model.loss.chunk_rows={chunk_rows} must be at least 1, or null to choose it from the vocabulary size."
            )
        self.terms = nn.ModuleDict(dict(terms))
        self.chunk_rows = chunk_rows
        if not any(max(term.schedules["weight"].values) > 0 for term in terms.values()):
            raise ValueError("model.loss.terms has no term with a weight above 0: there is nothing to learn.")

    def _logits(self, lm_head: Callable[[Tensor], Tensor], features: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Logits [R, Vd] divided by the temperature, in `dtype` (None: the dtype of the matrix product)."""
        logits = lm_head(features)
        if self.temperature != 1:
            return logits.to(dtype or torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        return logits if dtype is None else logits.to(dtype)

    def set_progress(self, progress: float) -> None:
        """Set scheduled weights and K to their values at `progress` (0 to 1)."""
        for term in self.terms.values():
            term.set_progress(progress)  # type: ignore[operator]

    def forward(self, *args: Any, **options: Any) -> LossOutput:
        """Compute the loss of the given positions, with the arguments of `LossPass` after `loss`."""
        return compute_together([LossPass(self, *args, **options)])[0]


class LossPass:
    """The loss of one head over the positions of a batch, accumulated chunk by chunk.

    Args:
        loss: terms, temperature and chunk size.
        step_features: J tensors [R, D], the draft's estimates.
        target_features: [R, D].
        vocabulary: the target's LM head, which gives the target's logits.
        wanted: [R] draft vocabulary index of the target's argmax, used for `LossOutput.hits`.
        normalizer: divisor of the sums (the number of loss positions across all processes).
        step_weights: one weight per step. Default: 1 each.
        draft_logits: the draft's logits [rows, Vd] of its features [rows, D]. Default: those of `vocabulary`.
        draft_output: what its LM head reads of its features [rows, D], which the terms get. Default: the features.
        trained: the parameters that `draft_logits` trains.
        counted: the positions that count in each step. Default: all.
        first_step: number of the first of the steps.
    """

    def __init__(
        self,
        loss: DraftLoss,
        step_features: Sequence[Tensor],
        target_features: Tensor,
        vocabulary: DraftVocabulary,
        wanted: Tensor,
        normalizer: Tensor | float,
        step_weights: Sequence[float] | None = None,
        *,
        draft_logits: Callable[[Tensor], Tensor] | None = None,
        draft_output: Callable[[Tensor], Tensor] | None = None,
        trained: Sequence[nn.Parameter] = (),
        counted: CountedRows | None = None,
        first_step: int = 1,
    ):
        self.loss, self.step_features, self.target_features = loss, step_features, target_features
        self.vocabulary, self.wanted, self.normalizer, self.counted = vocabulary, wanted, normalizer, counted
        self.target_logits = partial(vocabulary.logits, decoding=False)
        self.draft_logits, self.first_step = draft_logits or self.target_logits, first_step
        self.draft_output = draft_output or (lambda features: features)
        self.weights = step_weights or (1.0,) * len(step_features)
        self.active = {name: term for name, term in loss.terms.items() if term.weight > 0}  # type: ignore[operator]
        self.num_rows, self.device = target_features.shape[0], target_features.device
        self.with_gradient = torch.is_grad_enabled() and any(feature.requires_grad for feature in step_features)
        self.wide = torch.float64 if step_features[0].dtype == torch.float64 else torch.float32
        self.gradients = [torch.zeros_like(feature, dtype=self.wide) for feature in step_features]
        self.trained = list(trained) if self.with_gradient else []
        self.sums = [torch.zeros_like(each, dtype=self.wide) for each in self.trained]  # of the parameters' gradients
        self.total = torch.zeros((), device=self.device, dtype=self.wide)
        self.values = {
            f"{name}/step{step}": torch.zeros((), device=self.device, dtype=self.wide)
            for name in self.active
            for step in range(first_step, first_step + len(step_features))
        }
        self.hits = torch.zeros(len(step_features), self.num_rows, dtype=torch.bool, device=self.device)
        self.chunk_rows = loss.chunk_rows or max(1, CHUNK_BYTES[self.device.type != "cpu"] // (4 * len(vocabulary)))
        self.buffers: dict[torch.dtype, Tensor] = {}  # [chunk, Vd], one buffer per dtype

    def target_rows(self, rows: slice) -> TargetRows:
        """Return the target's values of a chunk, which all heads can use that `shares_target` with this one."""
        with torch.no_grad():
            features = self.target_features[rows]
            return TargetRows(features.to(self.wide), self.loss._logits(self.target_logits, features, self.wide))

    def shares_target(self, other: LossPass) -> bool:
        """Whether `target_rows` of both are equal for every chunk."""
        mine, theirs = (
            (id(each.target_features), id(each.vocabulary), each.wide, each.chunk_rows, each.loss.temperature)
            for each in (self, other)
        )
        return mine == theirs

    def add(self, rows: slice, target: TargetRows) -> None:
        """Add the loss of a chunk over all alignment steps, and compute its gradients."""
        for number, features in enumerate(self.step_features):
            self._add_step(number, features[rows].detach().requires_grad_(self.with_gradient), rows, target)

    def _add_step(self, number: int, leaf: Tensor, rows: slice, target: TargetRows) -> None:
        loss, device, wide = self.loss, self.device, self.wide
        compiled = loss.compiler.on and len(leaf) > 1  # a single row would trigger a recompilation
        with torch.set_grad_enabled(self.with_gradient):
            own_logits = loss._logits(self.draft_logits, leaf, None if compiled else wide)
            output = self.draft_output(leaf)  # `leaf` itself if the LM head reads the features
        # autocast would compute the dot products of the terms in bf16
        with torch.set_grad_enabled(self.with_gradient), torch.autocast(device.type, enabled=False):
            logits = own_logits.detach()
            if logits.dtype not in self.buffers:
                self.buffers[logits.dtype] = logits.new_empty(min(self.chunk_rows, self.num_rows), len(self.vocabulary))
            scratch = self.buffers[logits.dtype][: len(leaf)]
            passes: Passes = (
                CompiledPasses(logits, target, scratch, loss.compiler)
                if compiled
                else EagerPasses(logits, target, scratch)
            )
            seen = Chunk(output.to(wide), own_logits, target, number + self.first_step, passes, self.with_gradient)
            left_out = None if self.counted is None else ~self.counted.at(number, rows)
            chunk_loss = torch.zeros((), device=device, dtype=wide)
            for name, term in self.active.items():
                value = term(seen)
                value = (value if left_out is None else value.masked_fill(left_out, 0)).sum()
                self.values[f"{name}/step{number + self.first_step}"] += value.detach()
                chunk_loss = chunk_loss + term.weight * value
            chunk_loss = chunk_loss * self.weights[number]
            to_output, to_logits = seen.gradients(chunk_loss) if chunk_loss.requires_grad else (None, None)
            if to_output is not None and to_logits is not None:
                # the gradient of the sum is divided in fp32 below: in fp16 the tail of (q - p) / N is zero
                if output is leaf:
                    through, *own = torch.autograd.grad(own_logits, [leaf, *self.trained], to_logits)
                    through = through.to(wide) + to_output
                else:
                    known = [to_logits, to_output.to(output.dtype)]
                    through, *own = torch.autograd.grad([own_logits, output], [leaf, *self.trained], known)
                self.gradients[number][rows] = through.to(wide) / self.normalizer
                for so_far, gradient in zip(self.sums, own, strict=True):
                    so_far.add_(gradient)
        self.total += chunk_loss.detach() / self.normalizer
        self.hits[number, rows] = passes.hits(self.wanted[rows])
        if self.counted is not None:
            self.counted.see(number, rows, logits)

    def output(self) -> LossOutput:
        """Return the loss once all chunks were added."""
        total = self.total
        if self.with_gradient:
            gradients = [*self.gradients, *(each.div_(self.normalizer) for each in self.sums)]
            total = _KnownGradient.apply(total, gradients, *self.step_features, *self.trained)  # type: ignore[no-untyped-call]
        return LossOutput(total, self.values, self.hits)


def compute_together(passes: Sequence[LossPass]) -> list[LossOutput]:
    """Compute the losses of one or several heads over the same positions; the target's logits are computed once.

    Raises:
        ValueError: the heads have different target features, draft vocabularies, temperatures or chunk sizes.
    """
    first = passes[0]
    if not all(first.shares_target(each) for each in passes[1:]):
        raise ValueError(
            "heads that are trained together must have the same model.draft.vocab_size, model.loss.temperature and "
            "model.loss.chunk_rows, because they share the target's logits."
        )
    for start in range(0, first.num_rows, first.chunk_rows):
        rows = slice(start, start + first.chunk_rows)
        target = first.target_rows(rows)
        for each in passes:
            each.add(rows, target)
    return [each.output() for each in passes]
