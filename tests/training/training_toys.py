"""A small run on the tiny target, with the parts that hass-train assembles."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import torch
from hydra import compose, initialize_config_dir

from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.draft import Alignment, EagleDraft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.runs.config import config_folder
from hass_lightning.training.from_config import make_trainer
from hass_lightning.training.module import HassModule, Schedule
from hass_lightning.types import Conversation, Message

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "by", "two", "old", "men", "ate")


@dataclass(frozen=True)
class Corpus:
    """Conversations of few words, so that a head learns something within some steps."""

    count: int = 26

    def load(self, target):
        draw = torch.Generator().manual_seed(0)

        def words(number):
            return " ".join(WORDS[int(torch.randint(len(WORDS), (), generator=draw))] for _ in range(number))

        return [
            Conversation(str(n), (Message("user", f"{n} {words(2)}"), Message("assistant", words(2 + n % 5))))
            for n in range(self.count)
        ]


def make_data(target, cache_dir, **options):
    settings = {"num_validation": 6, "batch_size": 4, "cache_dir": str(cache_dir)} | options
    return FeatureDataModule(Corpus(), target, **settings)


def make_module(target, depth=3, token_ids=None, terms=None, lr=3e-3, seed=0, **options):
    torch.manual_seed(seed)
    draft = EagleDraft.from_target(target.config)
    loss = DraftLoss(terms or {"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK()})
    optimizer = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95))
    settings = {"schedule": Schedule(warmup_fraction=0.1), "token_ids": token_ids} | options
    return HassModule(draft, loss, Alignment(depth), target.head, optimizer, **settings)


@cache
def smoke_config():
    """Return the composed config of experiment=smoke."""
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose("train", overrides=["experiment=smoke"])


def make_small_trainer(data, folder, callbacks=(), loggers=(), **overrides):
    """Return the Trainer of `hass-train` with changed keys of conf/trainer."""
    settings = {
        "precision": "32-true", "log_every_n_steps": 1, "enable_model_summary": False, "enable_progress_bar": False,
        "default_root_dir": str(folder),
    } | overrides  # fmt: skip
    config = deepcopy(smoke_config())
    for key, value in settings.items():
        config.trainer[key] = value
    return make_trainer(config, data, list(callbacks), list(loggers) or False)
