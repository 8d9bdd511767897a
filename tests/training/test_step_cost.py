"""Cost of a training step: the losses and gradients of a naive implementation without its large tensors."""

from math import prod

import pytest
import torch
from transformers import LlamaConfig

from hass_lightning.draft import Alignment, EagleDraft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.training.module import HassModule
from hass_lightning.types import FeatureBatch
from live_tensors import Shapes
from naive_hass import naive_step

LENGTH, VOCAB, HIDDEN = 160, 4096, 32


def make(depth, chunk_rows=None, vocab=VOCAB, length=LENGTH, batch=2):
    """Return a module on a random embedding and LM head, and a random batch without every third position."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    head = TargetHead(torch.randn(vocab, HIDDEN) * 0.3, torch.randn(vocab, HIDDEN) * 0.3)
    loss = DraftLoss({"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK()}, chunk_rows)
    module = HassModule(EagleDraft.from_target(config), loss, Alignment(depth), head, torch.optim.AdamW)
    mask = (torch.arange(length) % 3 > 0).expand(batch, -1).clone()
    mask[:, -1] = False
    ids = torch.randint(0, vocab, (batch, length))
    features = torch.randn(batch, length, HIDDEN)
    return module, FeatureBatch(ids, mask, torch.full((batch,), length), features, ids.clone())


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_loss_and_gradient_equal_the_naive_implementation(depth):
    """`benchmarks/naive_hass.py` projects every band again, materializes all scores and runs one backward per step."""
    module, batch = make(depth, vocab=211, length=40)
    module.double()
    module.head = module.head.to(dtype=torch.float64)
    module.vocabulary = module.head.draft_vocabulary()
    batch.features = batch.features.double()
    ours = module.aligned_loss(batch).total
    ours.backward()
    gradients = [p.grad.clone() for p in module.draft.parameters()]
    module.draft.zero_grad()
    parts = (batch.features[:, :-1], batch.features[:, 1:], batch.loss_mask[:, :-1])
    naive = naive_step(module.draft, module.head.lm_head, module.head.embed(batch.input_ids[:, 1:]), *parts, depth)
    assert float(ours.detach()) == pytest.approx(naive, rel=1e-6)  # its soft targets are fp32
    for ours_gradient, parameter in zip(gradients, module.draft.parameters(), strict=True):
        torch.testing.assert_close(ours_gradient, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_no_tensor_of_positions_by_vocabulary_or_length_by_length_is_created(depth):
    """Forward and backward of a whole step; the largest tensor does not grow with the depth."""
    chunk_rows = 24
    module, batch = make(depth, chunk_rows)
    num_rows = int(batch.loss_mask.sum())
    assert num_rows > 8 * chunk_rows
    with Shapes() as shapes:
        module.aligned_loss(batch).total.backward()
    wide = [shape for shape in shapes.seen if VOCAB in shape and shape != (VOCAB, HIDDEN) and shape != (HIDDEN, VOCAB)]
    assert max(map(prod, wide)) == chunk_rows * VOCAB
    square = [
        shape for shape in shapes.seen if sum(size >= LENGTH - depth for size in shape) > 1 and VOCAB not in shape
    ]
    assert not square
    assert shapes.largest == VOCAB * HIDDEN  # the LM head itself


def test_naive_implementation_creates_them():
    """Otherwise the test above could not fail."""
    module, batch = make(3)
    parts = (batch.features[:, :-1], batch.features[:, 1:], batch.loss_mask[:, :-1])
    with Shapes() as shapes:
        naive_step(module.draft, module.head.lm_head, module.head.embed(batch.input_ids[:, 1:]), *parts, 3)
    assert (2, LENGTH - 1, VOCAB) in shapes.seen
    assert any(shape[-2:] == (LENGTH - 1, LENGTH - 1) and shape[0] == 3 for shape in shapes.seen)
