"""Train a HASS head without Hydra: python docs/train_from_python.py MODEL_FOLDER_OR_HUB_ID CHATS.jsonl HEAD_FOLDER"""

import sys
from functools import partial

import lightning
import torch

from hass_lightning import Alignment, DraftLoss, EagleDraft, FeatureDataModule, HassModule, TargetModel
from hass_lightning.data.prompts import JsonLines
from hass_lightning.draft import save_draft
from hass_lightning.losses import FeatureRegression, SoftCrossEntropy, TopK

path, chats, folder = sys.argv[1:]
target = TargetModel.load(path, "my_target")
data = FeatureDataModule(JsonLines(chats), target, num_validation=8, batch_size=4)
draft = EagleDraft.from_target(target.config)
loss = DraftLoss({"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(k=10)})  # HAD: top_k
optimizer = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95))
module = HassModule(draft, loss, Alignment(depth=3), target.head, optimizer)  # HCA: three alignment steps
data.num_batches = 3 * data.batches_per_epoch  # a run is one pass over numbered batches: here three epochs
trainer = lightning.Trainer(max_steps=data.num_batches, gradient_clip_val=0.5, logger=False, enable_checkpointing=False)
trainer.fit(module, datamodule=data)
save_draft(folder, draft, None, {"target": target.name, "target_fingerprint": target.fingerprint})
print(f"simulated acceptance length: {trainer.callback_metrics['val/acceptance_length']:.2f}")
