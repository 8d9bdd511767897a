"""Initialization of a head: least squares, or another head."""

import pytest
import torch
from transformers import LlamaConfig

from hass_lightning.draft import EagleDraft, save_draft
from hass_lightning.draft.initialize import least_squares_start, start_from
from hass_lightning.target_model.lm_head import TargetHead

D, V, T = 16, 40, 60


def make(fc_bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    head = TargetHead(torch.randn(V, D), torch.randn(V, D))
    truth, offset = torch.randn(D, 2 * D) / 8, torch.randn(D) if fc_bias else torch.zeros(D)
    sequences = []
    for _ in range(8):
        ids, features = torch.randint(0, V, (T,)), torch.randn(T, D)
        mask = torch.ones(T, dtype=torch.bool)
        for t in range(T - 1):  # features that are exactly this linear map
            features[t + 1] = truth @ torch.cat([head.embed(ids[t + 1]), features[t]]) + offset
        sequences.append({"input_ids": ids, "features": features, "loss_mask": mask})
    return EagleDraft(config, fc_bias=fc_bias), head, sequences, truth


@pytest.mark.parametrize("fc_bias", [False, True])
def test_least_squares_start_fits_a_linear_target(fc_bias):
    draft, head, sequences, _ = make(fc_bias)
    assert least_squares_start(draft, head, sequences, ridge=1e-7) == 8 * (T - 1)
    for sequence in sequences:
        embeddings = head.embed(sequence["input_ids"][1:])[None]
        with torch.no_grad():
            estimate = draft(embeddings, sequence["features"][None, :-1])[0]
        assert torch.allclose(estimate, sequence["features"][1:], atol=1e-3)


def test_only_loss_positions_are_used_up_to_max_rows():
    draft, head, sequences, truth = make()
    for sequence in sequences:
        sequence["loss_mask"][:10] = False
        sequence["features"][:8] = 1e3  # arbitrary values outside the loss positions
    rows = least_squares_start(draft, head, sequences, max_rows=100, ridge=1e-7)
    assert rows == 3 * (T - 11)
    assert torch.allclose(draft.fc.weight, truth, atol=1e-2)


def test_unknown_start_is_refused():
    with pytest.raises(ValueError, match=r"model\.draft\.start=zeros"):
        EagleDraft(LlamaConfig(hidden_size=8, num_attention_heads=1), start="zeros")


def test_start_from_loads_a_head_of_the_same_shapes(tmp_path):
    saved, _, _, _ = make()
    save_draft(tmp_path / "run" / "draft", saved, None, {})
    draft = EagleDraft(saved.config)
    start_from(draft, tmp_path / "run")
    assert all(torch.equal(value, draft.state_dict()[name]) for name, value in saved.state_dict().items())
    with pytest.raises(ValueError, match=r"init_from=.*fc\.bias.*model\.draft\.fc_bias"):
        start_from(EagleDraft(saved.config, fc_bias=True), tmp_path / "run")
    with pytest.raises(ValueError, match="no draft head"):
        start_from(draft, tmp_path)
