"""Harmonized objective distillation: the loss terms and their sum over alignment steps."""

from hass_lightning.losses.counted import CountedRows
from hass_lightning.losses.draft_loss import DraftLoss, LossOutput, LossPass, compute_together
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
    "BidirectionalTopK", "CountedRows", "DraftLoss", "ExpectedAcceptance", "FeatureRegression", "JensenShannon",
    "LogitDifferences", "LossOutput", "LossPass", "LossTerm", "NormedTopK", "RecallAtK", "ReverseKL", "Rows",
    "SoftCrossEntropy", "TargetRows", "TopK", "TopP", "TotalVariation", "compute_together",
]  # fmt: skip
