"""The 8-bit cache: an error of half a scale, the stated size, and a report that would show a bad cache."""

import json
import logging

import pytest
import torch

from hass_lightning.data.eight_bit import dequantize, fidelity, quantize
from hass_lightning.data.features import bytes_per_token, extract_features
from hass_lightning.data.manifest import write_feature_manifest
from hass_lightning.types import Tokens


def test_each_element_is_off_by_half_a_scale_at_most():
    features = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    features[7] = 0
    quantized, scales = quantize(features)
    error = (dequantize(quantized, scales) - features).abs()
    assert quantized.dtype == torch.int8
    assert (error <= scales[:, None] * 0.5001).all()
    assert not error[7].any()
    assert (quantized.abs().amax(-1)[torch.arange(50) != 7] == 127).all()


def test_the_report_is_perfect_only_for_the_same_features_and_falls_with_the_noise(tiny):
    generator = torch.Generator().manual_seed(0)
    features = tiny.encode(torch.randint(3, 250, (1, 80), generator=generator))[0].clone()
    same = fidelity(tiny.head, features, features)
    assert same == {"kl": pytest.approx(0, abs=1e-6), "top_k_overlap": 1.0, "argmax_agreement": 1.0}
    noise = torch.randn(features.shape, generator=generator)
    reports = [fidelity(tiny.head, features, features + size * noise) for size in (0.01, 0.1, 1.0)]
    for name, sign in (("kl", 1), ("top_k_overlap", -1)):
        values = [sign * report[name] for report in reports]
        assert values == sorted(values)
        assert values[0] < values[-1]
    assert fidelity(tiny.head, features, dequantize(*quantize(features)))["kl"] < 1e-3


def test_a_store_in_eight_bits_says_its_bytes_and_how_faithful_it_is(tiny, tmp_path, caplog):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 200, (length,), generator=generator) for length in (30, 9)]
    tokens = [Tokens(str(n), each, torch.arange(len(each)) < len(each) - 1) for n, each in enumerate(ids)]
    whole = extract_features(tiny, tokens, tmp_path)
    with caplog.at_level(logging.INFO):
        small = extract_features(tiny, tokens, tmp_path, eight_bit=True)
    assert small.folder != whole.folder
    (path,) = small.folder.glob("*.safetensors")
    announced = 39 * bytes_per_token(tiny, eight_bit=True)
    assert announced <= path.stat().st_size <= announced + 1000
    assert announced < 0.3 * 39 * bytes_per_token(tiny)
    note = json.loads(path.with_suffix(".json").read_text())
    assert 0 < note["kl"] < 1e-3
    assert note["top_k_overlap"] > 0.95
    assert any("top_k_overlap" in message for message in caplog.messages)
    for index in range(2):
        exact, near = whole.read(index), small.read(index)
        assert near["features"].dtype == torch.float32
        assert near.keys() == exact.keys()
        assert 0 < float((near["features"] - exact["features"]).abs().max()) < 0.05
        assert torch.equal(near["target_ids"], exact["target_ids"])


def test_runs_on_features_in_eight_bits_and_in_full_have_other_keys(tiny, tmp_path):
    tokens = [Tokens("a", torch.arange(3, 33), torch.arange(30) > 9)]
    keys = []
    for eight_bit in (False, True):
        store = extract_features(tiny, tokens, tmp_path, eight_bit=eight_bit)
        keys.append(write_feature_manifest(tmp_path / "features.json", tiny, (tokens, tokens), (store, store)))
    assert keys[0]["train"] != keys[1]["train"]
    online = write_feature_manifest(tmp_path / "features.json", tiny, (tokens, tokens), (None, None))
    assert online == keys[0]  # the same numbers, wherever they are stored
