"""hass-export: content of the files of each layout, and planted faults that the export checks must find."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hass_lightning.draft import EagleDraft, SavedDraft, import_head, load_draft, save_draft
from hass_lightning.draft.checkpoint import save_start
from hass_lightning.serving import PROFILES, RunFacts, export_head
from hass_lightning.serving.export_checks import check_export, parity
from hass_lightning.serving.reference import ReferenceHead, rope_readings, rotary_frequencies
from hass_lightning.target_model import TargetModel

LAYER = {
    f"layers.0.{name}.weight"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj", "post_attention_layernorm",
    )
}  # fmt: skip
KEYS = {"fc.weight", *LAYER}


def make_head(target, fc_bias=False, token_ids=None, seed=0):
    torch.manual_seed(seed)
    draft = EagleDraft.from_target(target.config, fc_bias=fc_bias)
    with torch.no_grad():
        draft.layer.post_attention_layernorm.weight.normal_(1, 0.1)
        for weight in (draft.fc.weight, draft.layer.mlp.down_proj.weight):
            weight.mul_(3)
    return SavedDraft(draft.eval(), token_ids, {"alignment_depth": 3})


def read(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


# --- content of the files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", PROFILES)
@pytest.mark.parametrize("fc_bias", [False, True], ids=["no bias", "bias"])
def test_keys_of_each_layout(tiny, tmp_path, format, fc_bias):
    saved, folder = make_head(tiny, fc_bias), tmp_path / "export"
    if format == "vllm" and fc_bias:
        with pytest.raises(ValueError, match=r"format=vllm.*max \|fc\.bias\| = 0\.\d+.*model\.draft\.fc_bias=false"):
            export_head(saved, tiny, format, folder)
        assert list(tmp_path.iterdir()) == []
        return
    manifest = export_head(saved, tiny, format, folder)
    tensors, config = read(folder)
    extra = {"fc.bias"} if fc_bias or format == "sglang" else set()
    assert set(tensors) == KEYS | extra | ({"embed_tokens.weight"} if format == "eagle" else set())
    assert config["architectures"] == ["LlamaForCausalLM" if format in ("eagle", "vllm") else "LlamaForCausalLMEagle"]
    assert ("bias" in config) == (format == "eagle")
    if format == "eagle":
        assert config["bias"] is fc_bias
        assert torch.equal(tensors["embed_tokens.weight"], tiny.head.embed_tokens)
    assert "--speculative-token-map" not in (folder / "README.md").read_text()
    if format == "sglang" and not fc_bias:
        assert not tensors["fc.bias"].any()
    assert set(manifest["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert manifest["gate"]["max_relative_difference"] < 1e-5
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_vllm_layout_drops_a_bias_of_zero(tiny, tmp_path):
    saved = make_head(tiny, fc_bias=True)
    torch.nn.init.zeros_(saved.draft.fc.bias)
    export_head(saved, tiny, "vllm", tmp_path / "export")
    assert set(read(tmp_path / "export")[0]) == KEYS


def test_hub_export_round_trip(tiny, tmp_path):
    saved = make_head(tiny, fc_bias=True, token_ids=torch.tensor([1, 5, 9]))
    export_head(saved, tiny, "hub", tmp_path / "export")
    again = load_draft(tmp_path / "export")
    assert again.token_ids.tolist() == [1, 5, 9]
    assert again.notes["alignment_depth"] == 3
    imported = import_head(str(tmp_path / "export"), tmp_path / "imported")  # as from the hub
    assert imported.token_ids.tolist() == [1, 5, 9]
    for name, value in saved.draft.state_dict().items():
        assert torch.equal(value, again.draft.state_dict()[name])
        assert torch.equal(value, imported.draft.state_dict()[name])


def test_pruned_vocabulary_has_a_token_map_for_sglang_and_a_warning_otherwise(tiny, tmp_path, caplog):
    saved = make_head(tiny, token_ids=torch.tensor([1, 5, 9]))
    export_head(saved, tiny, "sglang", tmp_path / "sglang")
    assert torch.load(tmp_path / "sglang" / "hot_token_ids.pt", weights_only=True) == [1, 5, 9]
    assert "--speculative-token-map sglang/hot_token_ids.pt\n" in (tmp_path / "sglang" / "README.md").read_text()
    assert not caplog.records
    export_head(saved, tiny, "vllm", tmp_path / "vllm")
    assert "no place for a draft vocabulary of 3 tokens" in caplog.text
    assert not list((tmp_path / "vllm").glob("*.pt"))
    # the head's weights do not depend on the pruning
    tensors = read(tmp_path / "sglang")[0]
    assert all(torch.equal(value, tensors[name]) for name, value in read(tmp_path / "vllm")[0].items())


def test_rope_is_written_in_both_formats_with_the_target_positions(tiny, tmp_path):
    target = TargetModel(deepcopy(tiny.model), tiny.tokenizer, "scaled", tiny.folder)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}
    target.config.rope_parameters, target.config.max_position_embeddings = rope, 4096
    saved = make_head(target)
    saved.draft.config.max_position_embeddings = 2048  # as in the official files
    export_head(saved, target, "vllm", tmp_path / "export")
    config = read(tmp_path / "export")[1]
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", **scaling}
    assert config["rope_parameters"] == rope
    assert config["max_position_embeddings"] == 4096
    for spelling in ("rope_scaling", "rope_parameters"):  # both formats are read as the same settings
        reader = LlamaConfig.from_dict({key: value for key, value in config.items() if key != spelling})
        assert {key: reader.rope_parameters[key] for key in rope} == rope


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_the_second_implementation_knows_the_frequencies(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope["factor"] = 8.0
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 256
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=dict(rope))
    own = LlamaRotaryEmbedding(config)
    for raw in ({"rope_theta": 10000.0, "rope_scaling": rope}, {"rope_parameters": rope}):
        found, scale = rotary_frequencies(list(rope_readings(raw).values())[-1], 64)
        torch.testing.assert_close(found.float(), own.inv_freq, rtol=1e-5, atol=0)
        assert scale == pytest.approx(own.attention_scaling)


def test_unsupported_rope_type_is_refused():
    with pytest.raises(ValueError, match="rope_type=longrope"):
        rotary_frequencies({"rope_theta": 1e4, "rope_type": "longrope"}, 64)


def test_dtype_of_the_file_and_overflow(tiny, tmp_path):
    saved = make_head(tiny)
    export_head(saved, tiny, "vllm", tmp_path / "bf16", dtype="bfloat16")
    tensors, config = read(tmp_path / "bf16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    with torch.no_grad():
        saved.draft.layer.mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is not finite in torch\.float16"):
        export_head(saved, tiny, "vllm", tmp_path / "fp16", dtype="float16")


# --- planted faults --------------------------------------------------------------------------------------------------


def tensor_fault(change):
    def fault(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return fault


def config_fault(**values):
    def fault(folder):
        config = json.loads((folder / "config.json").read_text())
        config |= values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "dropped"}))

    return fault


def perturb(tensors):
    tensors["layers.0.self_attn.k_proj.weight"][0, 0] += 1e-3


def transpose(tensors):
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].T.contiguous()


def swap(tensors):
    k, v = "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"
    tensors[k], tensors[v] = tensors[v], tensors[k]


FAULTS = {
    "a dropped key": (tensor_fault(lambda t: t.pop("layers.0.mlp.up_proj.weight")), r"missing \['layers\.0\.mlp\.up_p"),
    "a prefix": (tensor_fault(lambda t: t.update({"model.fc.weight": t.pop("fc.weight")})), r"'fc\.weight'.*'model"),
    "an input norm": (
        tensor_fault(lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(64)})),
        r"unexpected \['layers\.0\.input_layernorm\.weight'\]",
    ),
    "a bias for vLLM": (tensor_fault(lambda t: t.update({"fc.bias": torch.ones(64)})), r"unexpected \['fc\.bias'\]"),
    "a transposed tensor": (tensor_fault(transpose), r"wrong shape \['layers\.0\.mlp\.up_proj\.weight \(64, 128\)"),
    "a perturbed tensor": (tensor_fault(perturb), r"self_attn\.k_proj\.weight differs from the trained head"),
    "two swapped tensors": (tensor_fault(swap), r"k_proj\.weight differs.*v_proj\.weight differs"),
    "a constant tensor": (tensor_fault(lambda t: t["fc.weight"].fill_(0.1)), r"fc\.weight is constant"),
    "a NaN": (tensor_fault(lambda t: t["fc.weight"][0].fill_(torch.nan)), r"fc\.weight is not finite"),
    "another dtype": (
        tensor_fault(lambda t: t.update({"fc.weight": t["fc.weight"].half()})), r"fc\.weight is torch\.float16 instead"
    ),
    "bias: true": (config_fault(bias=True), r"bias=True: vllm would read it as biases of q, k, v and o"),
    "the target's layer count": (config_fault(num_hidden_layers=30), r"num_hidden_layers=30 instead of 1"),
    "an architecture": (config_fault(architectures=["LlamaForCausalLMEagle"]), "architectures="),
    "q, k, v, o biases": (config_fault(attention_bias=True), "attention_bias=True"),
    "positions of the official files": (config_fault(max_position_embeddings=512), "max_position_embeddings=512"),
    "a lost rope_theta": (config_fault(rope_theta="dropped"), "rope_theta=None instead of 10000"),
    "a lost rope_parameters": (config_fault(rope_parameters="dropped"), "rope_parameters=None"),
    "another epsilon": (config_fault(rms_norm_eps=1e-3), r"rms_norm_eps=0\.001"),
    "another vocabulary": (config_fault(vocab_size=32000), "vocab_size=32000 instead of 259"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    saved, folder = make_head(tiny), tmp_path_factory.mktemp("exported") / "vllm"
    export_head(saved, tiny, "vllm", folder)
    return SimpleNamespace(saved=saved, folder=folder)


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_refused(tiny, exported, tmp_path, fault, words):
    folder = tmp_path / "copy"
    shutil.copytree(exported.folder, folder)
    fault(folder)
    with pytest.raises(ValueError, match=words):
        check_export(folder, exported.saved, tiny, PROFILES["vllm"], torch.float32)


def test_eagle_config_must_agree_about_the_bias(tiny, tmp_path):
    saved = make_head(tiny, fc_bias=True)
    export_head(saved, tiny, "eagle", tmp_path / "eagle")
    config_fault(bias=False)(tmp_path / "eagle")
    with pytest.raises(ValueError, match=r"bias=False, but for this file it must be True"):
        check_export(tmp_path / "eagle", saved, tiny, PROFILES["eagle"], torch.float32)


@pytest.mark.parametrize("key", ["fc.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight"])
def test_different_logits_are_refused(tiny, exported, key):
    reference = ReferenceHead(exported.folder)
    reference.tensors[key] = reference.tensors[key] * 1.01
    with pytest.raises(ValueError, match="computes other logits"):
        parity(reference, exported.saved.draft, tiny, torch.float32)


def test_different_draft_tokens_are_refused(tiny, exported, monkeypatch):
    monkeypatch.setattr("hass_lightning.serving.export_checks.greedy_chain", lambda *_: [0] * 5)
    with pytest.raises(ValueError, match=r"drafts \[.*\] after token \d+ instead of \[0, 0, 0, 0, 0\]"):
        parity(ReferenceHead(exported.folder), exported.saved.draft, tiny, torch.float32)


def test_untrained_tensor_is_refused_and_no_file_is_left(tiny, tmp_path):
    saved = make_head(tiny)
    save_start(tmp_path / "start.json", saved.draft, "features")
    with torch.no_grad():
        for name, parameter in saved.draft.named_parameters():
            if "v_proj" not in name:
                parameter.mul_(1.01)
    facts = RunFacts.read(tmp_path)
    with pytest.raises(ValueError, match=r"refused: layers\.0\.self_attn\.v_proj\.weight still has its initial value"):
        export_head(saved, tiny, "vllm", tmp_path / "export", facts=facts)
    assert [path.name for path in tmp_path.iterdir()] == ["start.json"]


def test_non_empty_folder_and_unknown_format_are_refused(tiny, exported):
    with pytest.raises(ValueError, match=r"output_dir=.*is not empty"):
        export_head(exported.saved, tiny, "vllm", exported.folder)
    with pytest.raises(ValueError, match="format=trt is none of vllm, sglang, eagle, hub"):
        export_head(exported.saved, tiny, "trt", exported.folder)


# --- the command -----------------------------------------------------------------------------------------------------

METRICS = {
    "acceptance_length": 2.5, "acceptance_length_low": 2.25, "acceptance_length_high": 2.75, "speedup": 1.5,
    "speedup_low": 1.25, "speedup_high": 1.75, "num_prompts": 24, "num_checked": 5, "num_identical": 5,
}  # fmt: skip
TOKEN = "hf_" + "abcdefghij" * 3


@pytest.fixture
def run(tiny, tmp_path):
    """Create a run folder as hass-train writes it."""
    folder = tmp_path / "runs" / "mine"
    saved = make_head(tiny)
    notes = {"target": "tiny", "target_fingerprint": tiny.fingerprint, "loss_terms": {"top_k": 0.1}}
    save_draft(folder / "draft", saved.draft, None, notes)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(f"data: {{note: {TOKEN}}}\npaths: {{root: /secret/place}}\n")
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "provenance.json").write_text(json.dumps({"git_commit": "abc123", "config_hash": "def456"}))
    (folder / "start.json").write_text(json.dumps({"features": "f00d", "tensors": {"fc.weight": "0"}}))
    return folder


def test_hass_export_writes_card_and_manifest_and_uploads_nothing(call_command, run, monkeypatch):
    monkeypatch.setattr("hass_lightning.commands.export.upload", lambda *_: pytest.fail("uploaded unasked"))
    done = call_command("export", "target=tiny", f"draft={run}", "format=vllm", "output_dir=served")
    assert done.code == 0, done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    folder = run.parents[1] / "served"
    assert Path(result["output_dir"]).resolve() == folder
    card = (folder / "README.md").read_text()
    for words in ("2.50 | [2.25, 2.75]", "1.50 | [1.25, 1.75]", "abc123", "def456", "f00d", "vLLM 0.32.0", "5 of 5"):
        assert words in card
    assert TOKEN not in card
    assert "/secret/place" not in card
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["features"] == "f00d"
    assert manifest["gate"]["compared_with_initial_values"] is True
    assert set(manifest["tensors"]) == KEYS


@pytest.mark.slow
def test_upload_needs_a_name_and_is_private_by_default(call_command, run, monkeypatch):
    asked = []
    hub = SimpleNamespace(
        create_repo=lambda name, **options: asked.append((name, options)),
        upload_folder=lambda **options: asked.append(sorted(path.name for path in options["folder_path"].iterdir())),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    done = call_command("export", "target=tiny", f"draft={run}", "format=hub", "output_dir=card", "upload=me/head")
    assert done.code == 0, done.err
    assert asked == [
        ("me/head", {"private": True, "exist_ok": True}),
        ["README.md", "config.json", "manifest.json", "model.safetensors"],
    ]
    assert '"url": "https://huggingface.co/me/head"' in done.out


@pytest.mark.slow
def test_trained_head_is_compared_with_its_initial_values(call_command):
    few = ("trainer.max_steps=6", "data.source.num_questions=20", "callbacks.decoding=null", "logger=csv")
    done = call_command("train", "experiment=smoke", *few)
    assert done.code == 0, done.err
    run = json.loads(done.out.strip().splitlines()[-1])["run_dir"]
    for format in PROFILES:
        done = call_command("export", "target=tiny", f"draft={run}", f"format={format}", f"output_dir={format}")
        assert done.code == 0, done.err
        assert json.loads(done.out.strip().splitlines()[-1])["compared_with_initial_values"] is True
