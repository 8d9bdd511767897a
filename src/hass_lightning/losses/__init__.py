"""Harmonized objective distillation: the loss terms and their sum over alignment steps."""

from hass_lightning.losses.draft_loss import DraftLoss, LossOutput
from hass_lightning.losses.terms import FeatureRegression, LossTerm, Rows, SoftCrossEntropy, TargetRows, TopK

__all__ = ["DraftLoss", "FeatureRegression", "LossOutput", "LossTerm", "Rows", "SoftCrossEntropy", "TargetRows", "TopK"]
