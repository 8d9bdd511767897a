"""DeepSpeed on machines without a GPU, and validation of trainer settings that no strategy supports.

All other settings of strategies are YAML files in `conf/trainer`.
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
    """Lightning's `DeepSpeedStrategy` that also runs on CPU processes over gloo, and accumulates gradients correctly.

    Lightning 2.6 refuses DeepSpeed without CUDA in three places: an isinstance check, the check that every device has
    an index, and the index it passes to `deepspeed.initialize`. DeepSpeed itself runs on CPUs, and the device `cpu:1`
    is valid. Numbered CPU devices and one skipped check therefore suffice for the whole path: forward, backward, clip,
    step, save, resume, consolidate. It is slow; use it to test a configuration before using GPUs.

    Two more differences from Lightning's strategy apply to every device:

    - Lightning and DeepSpeed both divide the loss by `accumulate_grad_batches`, so gradients are too small and are
      clipped too late (observed in Lightning 2.6.6; DDP is correct). Here only Lightning divides.
    - Offloading works with any optimizer. DeepSpeed by default requires its own `DeepSpeedCPUAdam`, which needs a C++
      compiler at run time. torch's AdamW on offloaded state is slower and correct.
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

        # DeepSpeed would compile an all-reduce through shared memory at every first use (g++, ninja, ~35 s).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)  # what DeepSpeedStrategy.setup_environment calls after its check

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Call Lightning's backward without DeepSpeed's own division by the number of accumulated batches."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def whole_parameters(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which every process has the full parameters of a module, which ZeRO-3 partitions."""
    spread = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(spread)


def lost_process(error: BaseException) -> bool:
    """Return whether an error of a collective means that another process has exited (gloo, NCCL)."""
    return isinstance(error, torch.distributed.DistError) or any(
        words in str(error) for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Return the number of processes of a run: devices times nodes, from the `trainer` node of the config.

    Raises:
        ValueError: if the number depends on the machine; the schedule and batches of a run depend on it.
    """
    devices = trainer.get("devices") or 1
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ValueError(
            f"trainer.devices={devices} must be a number or a list such as [0,1]: the steps and batches of a run "
            "depend on it, so it must be the same on every machine."
        )
    return count * int(trainer.get("num_nodes") or 1)


def deepspeed_stage(trainer: Mapping[str, Any]) -> int | None:
    """Return the ZeRO stage of the `trainer` node of the config; None without DeepSpeed."""
    strategy = trainer.get("strategy", "auto")
    settings: Mapping[str, Any] = strategy if hasattr(strategy, "get") else {}
    name = str(settings.get("_target_", strategy)).rsplit(".", 1)[-1]
    return int(settings.get("stage", 2)) if "deepspeed" in name.lower() else None


def check_trainer_config(trainer: Mapping[str, Any]) -> None:
    """Raise an error for trainer settings that the strategy does not support, before anything is loaded.

    Args:
        trainer: the `trainer` node of the config (or any mapping with the arguments of `lightning.pytorch.Trainer`).

    Raises:
        ValueError: naming the key and what to set instead.
    """
    strategy = trainer.get("strategy", "auto")
    settings: Mapping[str, Any] = strategy if hasattr(strategy, "get") else {}
    stage = deepspeed_stage(trainer)
    if stage is None:
        return
    if trainer.get("gradient_clip_val") and trainer.get("gradient_clip_algorithm") == "value":
        raise ValueError(
            "trainer.gradient_clip_algorithm=value: DeepSpeed clips gradients by their norm only; "
            "use trainer.gradient_clip_algorithm=norm, or trainer=ddp, which clips by value"
        )
    if settings.get("offload_parameters") and stage != 3:
        raise ValueError(
            f"trainer.strategy.offload_parameters=true needs ZeRO stage 3, but this is stage {stage}; use "
            "trainer=deepspeed_zero3, or trainer.strategy.offload_parameters=false"
        )
    if settings.get("offload_optimizer") and stage == 0:
        raise ValueError(
            "trainer.strategy.offload_optimizer=true needs ZeRO stage 1, 2 or 3; use trainer=deepspeed_zero2"
        )
