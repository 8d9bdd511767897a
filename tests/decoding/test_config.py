"""Every YAML in conf/decoding builds the decoder of its name with the class defaults and explains each key."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import hass_lightning.runs.config  # noqa: F401 (registers the resolvers)
from hass_lightning.decoding import DynamicTree, Hybrid

FOLDER = Path(__file__).parents[2] / "conf" / "decoding"
NAMES = ["autoregressive", "chain", "draft_model", "dynamic_tree", "hybrid", "prompt_lookup", "static_tree"]


def test_every_decoder_has_a_config():
    assert set(NAMES) <= {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_yaml_builds_its_decoder(name):
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    decoder = instantiate(config)
    assert decoder.name == name
    if name == "dynamic_tree":  # its size depends on the machine
        assert decoder in (DynamicTree(16, 4, 4), DynamicTree(8, 3, 3))
    elif name == "hybrid":
        assert decoder in (Hybrid(12, 3, 4), Hybrid(8, 2, 4))
    else:
        assert decoder == type(decoder)()
    assert decoder.acceptance == {"autoregressive": "none", "draft_model": "sampled", "chain": "sampled"}.get(
        name, "deterministic"
    )
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        if line[0] not in "#_ ":
            assert "#" in line, line
