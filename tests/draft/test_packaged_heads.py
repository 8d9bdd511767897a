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
QUESTIONS = (
    "Write a short story about a robot who learns to paint.",
    "Write a Python function that returns the second largest number of a list.",
    "A shop sells pens at 3 dollars each. Anna buys 4 pens and pays with 20 dollars. How much change does she get?",
    "What causes the seasons on Earth?",
)
RECORDED = {HEADS[0]: 2.64, HEADS[1]: 2.73}  # τ on these questions: 64 greedy tokens each, in float32


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
def test_packaged_heads_decode_losslessly_and_accept_what_was_recorded():
    with initialize_config_dir(config_folder(), version_base="1.3"):
        target = instantiate(compose("train", overrides=["target.dtype=float32"]).target)
    models = decoding_models({path: load_draft(path) for path in HEADS}, target)
    prompts = [encode_prompt(target.tokenizer, [Message("user", question)]) for question in QUESTIONS]
    plain = [Autoregressive().generate(next(iter(models.values())), prompt, 64).token_ids for prompt in prompts]
    for path, each in zip(HEADS, models.values(), strict=True):
        results = [DynamicTree(16, 4, 4).generate(each, prompt, 64) for prompt in prompts]
        assert [result.token_ids for result in results] == plain
        accepted = [count for result in results for count in result.accepted]
        tau = sum(accepted) / len(accepted) + 1
        assert tau == pytest.approx(RECORDED[path], abs=0.1)  # processors round differently
