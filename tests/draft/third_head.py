"""A third kind of head, as one would add it: one file and one YAML."""

import torch

from hass_lightning.draft.head import DraftHead, Products, draft_config
from hass_lightning.draft.layers import DraftLayer


class SumDraft(DraftHead):
    """The attention reads the sum of embedding and projected feature, which is the residual, too."""

    architecture = "SumDraft"

    def __init__(self, config, vocab_size=None, start="random", attention="auto"):
        super().__init__(config, vocab_size, start, attention)
        self.feature_layers = tuple(config.sum_layers)
        self.down = torch.nn.Linear((len(self.feature_layers) + 1) * config.hidden_size, config.hidden_size, bias=False)
        self.block = DraftLayer(config)

    @classmethod
    def from_target(cls, target_config, layers=(1,), vocab_size=None):
        return cls(draft_config(target_config, sum_layers=list(layers)), vocab_size)

    @classmethod
    def from_saved(cls, config, notes, tensors):
        return cls(config)

    @property
    def layer(self):
        return self.block

    def products(self):
        sizes, products = self.layer.sizes(), self.layer.products()
        return Products(*sizes, self.down.weight.numel(), 0, *products, trains_lm_head=False)

    def read(self, features):
        own = features.shape[-1] == self.config.hidden_size
        return features if own else self.down(features.to(self.dtype))

    def inputs(self, embeddings, features):
        u = embeddings.to(features.dtype) + features
        return u, u
