"""The heads that ship with the package load by name, and decode what their target decodes."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, DynamicTree
from hass_lightning.draft import EagleDraft, load_draft
from hass_lightning.draft.checkpoint import packaged_head
from hass_lightning.draft.initialize import start_from
from hass_lightning.measure.heads import decoding_models
from hass_lightning.runs.config import config_folder
from hass_lightning.types import Message

HEADS = ("package://heads/smollm2_135m_eagle", "package://heads/smollm2_135m_hass")


@pytest.mark.parametrize("path", HEADS)
def test_a_packaged_head_loads_and_initializes_another(path):
    saved = load_draft(path)
    assert saved.notes["target"] == "smollm2_135m" and len(saved.token_ids) == 8192
    assert all(torch.isfinite(parameter).all() for parameter in saved.draft.parameters())
    other = EagleDraft(saved.draft.config)
    start_from(other, path)
    assert all(
        torch.equal(a.float(), b.float()) for a, b in zip(other.parameters(), saved.draft.parameters(), strict=True)
    )


def test_only_targets_with_a_packaged_head_have_one():
    assert packaged_head("smollm2_135m") == HEADS[1]
    assert packaged_head("tiny") is None


@pytest.mark.slow
def test_packaged_heads_decode_losslessly_and_accept_more_than_a_new_head():
    with initialize_config_dir(config_folder(), version_base="1.3"):
        target = instantiate(compose("train", overrides=["target.dtype=float32"]).target)
    models = decoding_models({path: load_draft(path) for path in HEADS}, target)
    question = "Write a short story about a robot who learns to paint."
    prompt = encode_prompt(target.tokenizer, [Message("user", question)])
    expected = Autoregressive().generate(next(iter(models.values())), prompt, 64).token_ids
    for each in models.values():
        result = DynamicTree(16, 4, 4).generate(each, prompt, 64)
        assert result.token_ids == expected
        assert (sum(result.accepted) + len(result.accepted)) / len(result.accepted) > 1.6
