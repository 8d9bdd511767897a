"""TargetModel: cached chunks and trees equal a full forward; head, draft vocabulary and fingerprint."""

import json
import random
import shutil
from copy import deepcopy

import pytest
import torch

from hass_lightning.target_model import DraftVocabulary, TargetHead, TargetModel
from hass_lightning.target_model.tiny import tiny_llama

IDS = torch.tensor([[7, 30, 99, 4, 4, 120, 61, 200, 12, 45, 33, 8]])


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7], [3, 1, 6, 2], [11, 1]])
def test_cached_chunks_equal_one_forward(tiny, pieces):
    cache, parts, start = tiny.new_cache(1, 20), [], 0
    for count in pieces:
        parts.append(tiny.forward(IDS[:, start : start + count], cache))
        cache.advance(count)
        start += count
    torch.testing.assert_close(torch.cat(parts, dim=1), tiny.encode(IDS), atol=1e-5, rtol=1e-5)


def test_right_padding_does_not_change_features(tiny):
    padded = torch.cat([IDS, torch.full((1, 9), 77)], dim=1)
    torch.testing.assert_close(tiny.encode(padded)[:, :12], tiny.encode(IDS), atol=1e-5, rtol=1e-5)


def random_tree(draw, count):
    """Return the parents of `count` nodes; the parent of the root is -1 (the cached text)."""
    return [-1] + [draw.randrange(node) for node in range(1, count)]


def path_to(parents, node):
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("seed", range(4))
def test_tree_mask_equals_a_forward_of_every_path(tiny, seed):
    draw = random.Random(seed)
    parents = random_tree(draw, 9)
    tokens = [draw.randrange(3, 250) for _ in parents]
    cache = tiny.new_cache(1, 32)
    tiny.forward(IDS, cache)
    cache.advance(12)
    paths = [path_to(parents, node) for node in range(9)]
    mask = torch.zeros(1, 1, 9, 21, dtype=torch.bool)
    mask[..., :12] = True
    for node, path in enumerate(paths):
        mask[0, 0, node, [12 + other for other in path]] = True
    positions = torch.tensor([[12 + len(path) - 1 for path in paths]])
    features = tiny.forward(torch.tensor([tokens]), cache, positions, mask)
    for node, path in enumerate(paths):
        text = torch.cat([IDS, torch.tensor([[tokens[other] for other in path]])], dim=1)
        torch.testing.assert_close(features[0, node], tiny.encode(text)[0, -1], atol=1e-5, rtol=1e-5)
    # keep the accepted path; decoding continues as if there had been no other nodes
    path = max(paths, key=len)
    cache.keep(torch.tensor(path))
    text = torch.cat([IDS, torch.tensor([[tokens[other] for other in path]])], dim=1)
    following = tiny.forward(torch.tensor([[50]]), cache)
    expected = tiny.encode(torch.cat([text, torch.tensor([[50]])], dim=1))[:, -1:]
    torch.testing.assert_close(following, expected, atol=1e-5, rtol=1e-5)


def test_logits_are_those_of_the_whole_model(tiny):
    with torch.no_grad():
        expected = tiny.model(IDS).logits
    torch.testing.assert_close(tiny.head.logits(tiny.encode(IDS)), expected, atol=1e-5, rtol=1e-5)


def test_model_is_frozen_and_in_evaluation_mode(tiny):
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not tiny.head.lm_head.requires_grad


def test_end_tokens_come_from_generation_config_and_tokenizer(tiny):
    assert tiny.tokenizer.convert_tokens_to_ids("<|im_end|>") in tiny.eos_token_ids
    copy = tiny.in_dtype(torch.float32)
    copy.model.generation_config.eos_token_id = [5, 6]
    assert copy.eos_token_ids == {5, 6, tiny.tokenizer.eos_token_id}


def test_another_dtype_is_a_copy(tiny):
    copy = tiny.in_dtype(torch.bfloat16)
    assert (copy.dtype, tiny.dtype) == (torch.bfloat16, torch.float32)
    assert copy.fingerprint == tiny.fingerprint


def test_tiny_target_is_reproducible_and_depends_on_the_seed(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("HASS_LIGHTNING_CACHE", str(tmp_path))
    torch.manual_seed(123)
    again = TargetModel.load(tiny_llama(seed=0), "again", dtype="float32")
    assert again.fingerprint == tiny.fingerprint
    assert torch.equal(again.head.lm_head, tiny.head.lm_head)
    other = TargetModel.load(tiny_llama(seed=1), "other", dtype="float32")
    assert other.fingerprint != tiny.fingerprint


def test_first_layers_form_a_model(tiny):
    small = TargetModel.load(tiny.folder, "small", dtype="float32", num_layers=1)
    assert len(small.model.base_model.layers) == 1 == len(small.new_cache(1, 4).keys)
    assert torch.equal(small.head.lm_head, tiny.head.lm_head)
    assert small.fingerprint != tiny.fingerprint


def test_a_sliding_window_bounds_the_length(tiny):
    copy = tiny.in_dtype(torch.float32)
    copy.config.sliding_window = None  # as in Qwen2 models without a sliding window
    assert copy.max_length == tiny.max_length == 2048
    copy.config.sliding_window = 48
    assert copy.max_length == 48


def test_the_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    small = deepcopy(tiny.model)
    small.resize_token_embeddings(100)
    small.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer in .* has \d+ tokens and the model 100"):
        TargetModel.load(folder, "mixed", dtype="float32")


def changed_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def changed_weights(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def changed_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def changed_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("im_start", "im_begin"))


CHANGES = [changed_config, changed_weights, changed_template, changed_tokenizer]


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_covers_what_features_depend_on(tiny, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(tiny.folder, folder)
    assert TargetModel(tiny.model, tiny.tokenizer, "copy", folder).fingerprint == tiny.fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=8))
    assert TargetModel(tiny.model, tiny.tokenizer, "copy", folder).fingerprint == tiny.fingerprint
    change(folder)
    assert TargetModel(tiny.model, tiny.tokenizer, "copy", folder).fingerprint != tiny.fingerprint


# --- the head --------------------------------------------------------------------------------------------------------


def test_draft_vocabulary_converts_indices_in_both_directions():
    torch.manual_seed(0)
    weight, bias = torch.randn(10, 4), torch.randn(10)
    kept = torch.tensor([1, 4, 7])
    vocabulary = DraftVocabulary(weight, bias, kept)
    features = torch.randn(2, 3, 4)
    whole = TargetHead(torch.randn(10, 4), weight, bias).logits(features)
    torch.testing.assert_close(vocabulary.logits(features), whole[..., kept])
    assert len(vocabulary) == 3
    assert vocabulary.to_token_ids(torch.tensor([[0, 2]])).tolist() == [[1, 7]]
    assert vocabulary.to_indices(torch.arange(10)).tolist() == [-1, 0, -1, -1, 1, -1, -1, 2, -1, -1]


def test_the_full_vocabulary_is_the_identity(tiny):
    vocabulary = tiny.head.draft_vocabulary()
    ids = torch.arange(259)
    assert len(vocabulary) == 259
    assert torch.equal(vocabulary.to_token_ids(ids), ids)
    assert torch.equal(vocabulary.to_indices(ids), ids)


def test_tied_embeddings_stay_one_tensor_in_another_dtype():
    weight = torch.randn(10, 4)
    tied = TargetHead(weight, weight).to(dtype=torch.bfloat16)
    assert tied.embed_tokens.data_ptr() == tied.lm_head.data_ptr()
    assert (tied.vocab_size, tied.hidden_size) == (10, 4)
    apart = TargetHead(weight.clone(), weight).to(dtype=torch.bfloat16)
    assert apart.embed_tokens.data_ptr() != apart.lm_head.data_ptr()


def test_layers_spread_over_devices_give_the_same_features(tiny, tmp_path):
    """A layer offloaded to disk serves as the second device: accelerate moves it in and out."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = TargetModel.load(tiny.folder, "tiny", dtype="float32", device_map=places)
    assert any(p.is_meta for p in spread.model.parameters())
    input_ids = torch.arange(3, 40)[None]
    assert torch.equal(spread.encode(input_ids), tiny.encode(input_ids))
    with pytest.raises(ValueError, match=r"device_map offloads the embedding or the LM head to disk"):
        TargetModel.load(tiny.folder, "tiny", dtype="float32", device_map=places | {"lm_head": "disk"})


def test_head_only_target_has_the_same_embedding_and_lm_head(tiny):
    ends = TargetModel.load(tiny.folder, "tiny", dtype="float32", head_only=True)
    assert torch.equal(ends.head.lm_head, tiny.head.lm_head)
    assert torch.equal(ends.head.embed_tokens, tiny.head.embed_tokens)
    assert (ends.fingerprint, ends.dtype, ends.eos_token_ids) == (tiny.fingerprint, tiny.dtype, tiny.eos_token_ids)
    with pytest.raises(ValueError, match=r"target\.head_only=true reads no layers.*hass-prepare"):
        ends.encode(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target\.head_only=true reads no layers"):  # the same holds for a copy
        ends.in_dtype(torch.bfloat16).encode(torch.ones(1, 4, dtype=torch.int64))


def test_sizes_are_checked_against_the_config(tiny):
    with pytest.raises(ValueError, match=r"target\.sizes says \{'hidden_size': 65\}"):
        TargetModel.load(tiny.folder, "tiny", dtype="float32", sizes={"hidden_size": 65, "vocab_size": 259})


def test_processing_after_the_lm_head_is_refused(tiny):
    from copy import deepcopy

    model = deepcopy(tiny.model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        TargetModel(model, tiny.tokenizer, "capped", tiny.folder)
