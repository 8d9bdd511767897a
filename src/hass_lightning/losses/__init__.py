"""Harmonized objective distillation: the loss terms and their sum over alignment steps."""

from hass_lightning.losses.draft_loss import DraftLoss, LossOutput
from hass_lightning.losses.terms import FeatureRegression, LossTerm, Rows, SoftCrossEntropy, TargetRows, TopK
from hass_lightning.losses.variants import (
    BidirectionalTopK,
    ExpectedAcceptance,
    JensenShannon,
    LogitDifferences,
    NormedTopK,
    RecallAtK,
    ReverseKL,
    TopP,
    TotalVariation,
)

__all__ = [
    "BidirectionalTopK",
    "DraftLoss",
    "ExpectedAcceptance",
    "FeatureRegression",
    "JensenShannon",
    "LogitDifferences",
    "LossOutput",
    "LossTerm",
    "NormedTopK",
    "RecallAtK",
    "ReverseKL",
    "Rows",
    "SoftCrossEntropy",
    "TargetRows",
    "TopK",
    "TopP",
    "TotalVariation",
]
