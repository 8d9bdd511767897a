"""Train a toy model with a file of conf/trainer. A script, because multi-process strategies run their script again.

python strategy_toy.py TRAINER FOLDER MAX_EPOCHS [CHECKPOINT] [OVERRIDE ...]
"""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from hass_lightning.runs.config import config_folder
from hass_lightning.training.strategy import check_trainer_config


class Toy(L.LightningModule):
    """A trained layer before a frozen one, as the draft head before the target's LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # the checkpoint has no frozen parameters
        self.trained = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = ((self.frozen(self.trained(batch)) - batch[:, :4]) ** 2).mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)}


def main(trainer_name: str, folder: str, max_epochs: str, checkpoint: str = "", *overrides: str) -> None:
    warnings.filterwarnings("ignore")
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose(
            overrides=[
                f"+paths.run_dir={folder}",
                f"+trainer={trainer_name}",
                "trainer.accelerator=cpu",
                "trainer.precision=32-true",
                "trainer.accumulate_grad_batches=2",
                "trainer.enable_progress_bar=false",
                "trainer.enable_model_summary=false",
                f"trainer.max_epochs={max_epochs}",
                *overrides,
            ]
        )
    check_trainer_config(config.trainer)
    L.seed_everything(0)
    settings = {key: value for key, value in config.trainer.items() if key != "rendezvous_timeout"}
    trainer = instantiate(settings, logger=False, callbacks=[])
    data = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4, shuffle=False)
    model = Toy()
    trainer.fit(model, data, ckpt_path=checkpoint or None)
    saved = str(Path(folder) / "last.ckpt")
    trainer.save_checkpoint(saved)
    if trainer.is_global_zero:
        result = {
            "loss": float(trainer.callback_metrics["loss"]),
            "world_size": trainer.world_size,
            "steps": trainer.global_step,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
