"""Export of EAGLE-3 heads: the published names and keys, round trips, and planted faults that are found by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hass_lightning.checks.head import check_head
from hass_lightning.draft import Eagle3Draft, SavedDraft, import_head, load_draft
from hass_lightning.serving import export_head
from hass_lightning.serving.engines import EAGLE3_PROFILES
from hass_lightning.serving.export_checks import check_export

NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "hidden_norm", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
KEYS = {f"midlayer.{name}.weight" for name in NAMES} | {"fc.weight", "norm.weight", "lm_head.weight"}
KEPT = torch.tensor([0, 2, *range(5, 60), 101, 258])


def make_head(target, token_ids=KEPT, **options):
    torch.manual_seed(0)
    size = None if token_ids is None else len(token_ids)
    draft = Eagle3Draft.from_target(target.config, vocab_size=size, **options)
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return SavedDraft(draft.eval(), token_ids, {"alignment_depth": 7})


def read(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("token_ids", [KEPT, None], ids=["pruned", "full"])
@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_engines_get_the_published_names_and_keys(tiny, tmp_path, format, token_ids):
    saved = make_head(tiny, token_ids)
    manifest = export_head(saved, tiny, format, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    assert set(tensors) == KEYS | {"d2t", "t2d"}
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    wanted = {"tie_word_embeddings": False, "norm_before_residual": False, "num_hidden_layers": 1}
    assert wanted.items() <= config.items() and "bias" not in config
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1]
    assert config["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1]}
    ids = KEPT if token_ids is not None else torch.arange(259)
    assert config["draft_vocab_size"] == len(ids)
    assert torch.equal(torch.arange(len(ids)) + tensors["d2t"], ids)
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero()[:, 0].tolist() == ids.tolist()
    assert manifest["gate"]["max_relative_difference"] < 1e-5
    assert {"vllm": '"method": "eagle3"', "sglang": "EAGLE3"}[format] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("format", EAGLE3_PROFILES)
def test_what_is_exported_is_imported_with_its_layers_and_tokens(tiny, tmp_path, format):
    saved = make_head(tiny, feature_layers=[1])
    export_head(saved, tiny, format, tmp_path / "out", dtype="bfloat16")
    import_head(str(tmp_path / "out"), tmp_path / "mine")
    again = load_draft(tmp_path / "mine")
    assert isinstance(again.draft, Eagle3Draft)
    assert (again.draft.feature_layers, again.token_ids.tolist()) == ((1,), KEPT.tolist())
    for name, value in saved.draft.state_dict().items():
        assert torch.equal(again.draft.state_dict()[name].bfloat16(), value.bfloat16()), name
    again.check_fit("mine", tiny)
    assert {finding.status for finding in check_head(tmp_path / "out", tiny)} == {"ok"}


FAULTS = {
    "a tied embedding": (lambda t, c: c.update(tie_word_embeddings=True), "tie_word_embeddings=True"),
    "another residual": (lambda t, c: c.update(norm_before_residual=True), "norm_before_residual=True"),
    "layers at one level": (lambda t, c: c.pop("eagle_aux_hidden_state_layer_ids"), "eagle_aux_hidden_state_layer_ids"),
    "token ids, not offsets": (lambda t, c: t.update(d2t=KEPT.clone()), "d2t does not match"),
    "no norm": (lambda t, c: t.pop("norm.weight"), r"missing \['norm\.weight'\]"),
    "an untrained tensor": (lambda t, c: t["lm_head.weight"].zero_(), "lm_head.weight is constant"),
    "halves swapped": (
        lambda t, c: t.update({"midlayer.self_attn.q_proj.weight": t["midlayer.self_attn.q_proj.weight"].roll(64, 1)}),
        "q_proj.weight differs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_by_name(tiny, tmp_path, fault):
    change, message = FAULTS[fault]
    saved, folder = make_head(tiny), tmp_path / "out"
    export_head(saved, tiny, "vllm", folder)
    tensors, config = read(folder)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        check_export(folder, saved, tiny, EAGLE3_PROFILES["vllm"], torch.float32)


UNREADABLE = {
    "another residual": (lambda t, c: c.update(norm_before_residual=True), "norm_before_residual=True"),
    "no layers": (
        lambda t, c: [c.pop("eagle_aux_hidden_state_layer_ids"), c.pop("eagle_config")], "set feature_layers to",
    ),
    "ids, not offsets": (lambda t, c: t.update(d2t=KEPT.clone()), "ascending token ids"),
    "another t2d": (lambda t, c: t.update(t2d=~t["t2d"]), "name different tokens"),
    "a norm of EAGLE-3.1": (lambda t, c: t.update({"fc_norm.0.weight": torch.ones(64)}), "fc_norm.0.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_head_that_cannot_be_read_as_it_is_meant_is_refused(tiny, tmp_path, fault):
    change, message = UNREADABLE[fault]
    folder = tmp_path / "out"
    export_head(make_head(tiny), tiny, "vllm", folder)
    tensors, config = read(folder)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        import_head(str(folder), tmp_path / "mine")
    if fault == "no layers":
        saved = import_head(str(folder), tmp_path / "mine", feature_layers=[0, 1])
        assert saved.draft.feature_layers == (0, 1)


def test_a_borrowed_lm_head_is_for_hass_lightning_alone(tiny, tmp_path):
    saved = make_head(tiny, lm_head="target")
    with pytest.raises(ValueError, match=r"model\.draft\.lm_head=own"):
        export_head(saved, tiny, "vllm", tmp_path / "out")
    with pytest.raises(ValueError, match="format=eagle is none of vllm, sglang, hub"):
        export_head(saved, tiny, "eagle", tmp_path / "out")
