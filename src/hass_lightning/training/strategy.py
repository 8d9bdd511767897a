"""DeepSpeed on machines without a GPU, and the trainer settings that no strategy can honour.

Everything else about strategies is a YAML in `conf/trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy` that also runs on CPU processes over gloo, and accumulates gradients rightly.

    Lightning 2.6 refuses DeepSpeed without CUDA in three places: an isinstance check, the check that every device has
    an index, and the index it hands to `deepspeed.initialize`. Real DeepSpeed runs on a CPU, and a device
    `cpu:1` is legal, so numbered CPU devices and one skipped check make the whole path real: forward, backward, clip,
    step, save, resume, consolidate. It is slow, and there to try a configuration before paying for GPUs, and for tests.

    Two more differences from the stock strategy, on every device:

    - Lightning and DeepSpeed both divide the loss by `accumulate_grad_batches`, so gradients come out too small and are
      clipped too late (seen in Lightning 2.6.6; with DDP they are right). Here only Lightning divides.
    - Offloading works with any optimizer. DeepSpeed's default insists on its own `DeepSpeedCPUAdam`, which needs a C++
      compiler at run time; torch's AdamW on offloaded state is slower, and right.
    """

    strategy_name = "deepspeed_cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.config is not None
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def setup_environment(self) -> None:
        """Number the CPU devices and start the process group without the CUDA check."""
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        import deepspeed.ops

        # An all-reduce through shared memory that DeepSpeed would compile at every first use (g++, ninja, ~35 s).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)  # what DeepSpeedStrategy.setup_environment calls after its check

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's backward, without DeepSpeed's own division by the number of accumulated batches."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def whole_parameters(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Within it every process sees the whole parameters of a module, which ZeRO-3 spreads over the processes."""
    spread = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(spread)


def lost_process(error: BaseException) -> bool:
    """Whether an error of a collective says that another process is gone (gloo, NCCL)."""
    return isinstance(error, torch.distributed.DistError) or any(
        words in str(error) for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Processes of a run: devices times nodes, of the `trainer` node of the config.

    Raises:
        ValueError: a number that only the machine knows; schedule and batches of a run depend on it.
    """
    devices = trainer.get("devices") or 1
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ValueError(
            f"trainer.devices={devices} must be a number or a list such as [0,1]: the steps of a run and their batches "
            "depend on it, so it must not change from machine to machine."
        )
    return count * int(trainer.get("num_nodes") or 1)


def check_trainer_config(trainer: Mapping[str, Any]) -> None:
    """Refuse trainer settings that the strategy cannot honour, before anything is loaded.

    Args:
        trainer: the `trainer` node of the config (or any mapping with the arguments of `lightning.pytorch.Trainer`).

    Raises:
        ValueError: naming the key and what to write instead.
    """
    strategy = trainer.get("strategy", "auto")
    settings: Mapping[str, Any] = strategy if isinstance(strategy, Mapping) or hasattr(strategy, "get") else {}
    name = str(settings.get("_target_", strategy)).rsplit(".", 1)[-1]
    if "deepspeed" not in name.lower():
        return
    if trainer.get("gradient_clip_val") and trainer.get("gradient_clip_algorithm") == "value":
        raise ValueError(
            "trainer.gradient_clip_algorithm=value: DeepSpeed clips gradients by their norm only; "
            "use trainer.gradient_clip_algorithm=norm, or trainer=ddp, which clips by value"
        )
    stage = int(settings.get("stage", 2))
    if settings.get("offload_parameters") and stage != 3:
        raise ValueError(
            f"trainer.strategy.offload_parameters=true needs ZeRO stage 3, and this is stage {stage}; "
            "use trainer=deepspeed_zero3, or trainer.strategy.offload_parameters=false"
        )
    if settings.get("offload_optimizer") and stage == 0:
        raise ValueError(
            "trainer.strategy.offload_optimizer=true needs ZeRO stage 1, 2 or 3; use trainer=deepspeed_zero2"
        )
