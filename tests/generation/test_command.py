"""`hass-generate` and the run folders that commands follow: overrides, refusals, missing values, free text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from command_environment import command_environment
from hass_lightning.commands.conf_text import comment_of, parse_conf
from hass_lightning.commands.free_text import quoted, quoted_path
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.from_config import follow_run
from terminal import foreign_lines


def followed(command, *overrides):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return follow_run(compose(command, overrides=list(overrides)), overrides)


@pytest.mark.parametrize("where", ["", "/draft"])
def test_target_decoding_and_data_follow_from_the_run(run_dir, where):
    config = followed("generate", f"draft={run_dir}{where}")
    assert (config.target.name, config.decoding.num_nodes) == ("tiny", 12)
    config = followed("benchmark", f"draft={run_dir}{where}")
    assert (config.target.name, config.data.num_validation) == ("tiny", 8)
    assert followed("doctor", f"draft={run_dir}").target.name == "tiny"
    assert followed("export", f"draft={run_dir}", "format=hub", "output_dir=x").target.name == "tiny"
    assert followed("benchmark", f"drafts=[{run_dir}]").target.name == "tiny"


def test_any_override_wins(run_dir):
    config = followed("generate", f"draft={run_dir}", "target.dtype=bfloat16", "decoding=chain", "decoding.depth=5")
    assert (config.target.name, config.target.dtype) == ("tiny", "bfloat16")
    assert (config.decoding._target_.split(".")[-1], config.decoding.depth) == ("Chain", 5)
    config = followed("benchmark", f"draft={run_dir}", "target=smollm2_135m", "++data.source.num_questions=3")
    assert (config.target.name, config.data.source.num_questions) == ("smollm2_135m", 3)
    assert followed("doctor", f"draft={run_dir}", "experiment=quickstart").target.name == "smollm2_135m"


@pytest.mark.parametrize("draft", ["packaged", "package://heads/smollm2_135m_hass", "null", "nowhere"])
def test_a_head_outside_of_a_run_leaves_the_config(draft):
    assert followed("generate", f"draft={draft}").target.name == "smollm2_135m"


@pytest.mark.parametrize(
    ("key", "value"), [("target.path._target_", "os.path.join"), ("data.source._target_", "my_package.Source")]
)
def test_a_run_folder_cannot_run_foreign_code(run_dir, tmp_path, key, value):
    config = OmegaConf.load(run_dir / ".hydra" / "config.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.update(config, "target.trust_remote_code", True, force_add=True)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(config, tmp_path / ".hydra" / "config.yaml")
    with pytest.raises(ValueError, match=value):
        followed("benchmark", f"draft={tmp_path}")
    group, chosen = key.split(".")[0], {"target": "tiny", "data": "smoke"}[key.split(".")[0]]
    config = followed("benchmark", f"draft={tmp_path}", f"{group}={chosen}")
    assert not config.target.get("trust_remote_code")


def test_one_answer_as_text_and_as_json(call_command, run_dir, chat, tmp_path):
    words = (f"draft={run_dir}", "max_new_tokens=12", 'prompt=Why, and how "so"?')
    done = call_command("generate", *words, "record=chat.svg")
    assert done.code == 0, done.err
    assert "tokens/s" in done.out and "τ" in done.out and "{" not in done.out.splitlines()[-1]
    assert (tmp_path / "chat.svg").read_text().startswith("<svg")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.svg"]
    done = call_command("generate", *words, "output=json")
    answer = chat.generate('Why, and how "so"?', 12)
    assert json.loads(done.out) == {
        "answer": answer.text, "num_tokens": 12, "acceptance_length": answer.tokens_per_forward,
        "tokens_per_second": json.loads(done.out)["tokens_per_second"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        (
            "export",
            [],
            ["draft (a run folder", "format (the engine", "vllm | sglang | eagle", "output_dir", "draft=… form"],
        ),
        ("export", ["draft=x", "output_dir=y"], ["format (the engine", "Add format=… to the command"]),
        ("import", [], ["path (a folder with config.json"]),
        ("train", ["experiment=smoke", "data=jsonl"], ["data.source.path (the file: .jsonl", "Add data.source.path=…"]),
        ("generate", ["target=tiny"], ["draft=packaged", "target=tiny", "run folder"]),
        ("generate", ["draft=nowhere"], ["nowhere", "no draft head"]),
        ("generate", ["output=json"], ["output=json", "prompt"]),
        ("generate", ["temperature=-1"], ["temperature=-1"]),
        ("generate", ["max_new_tokens=0"], ["max_new_tokens=0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_the_key(call_command, command, overrides, words):
    done = call_command({"import": "import_head"}.get(command, command), *overrides)
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert not [word for word in words if word not in line], line
    assert "Missing mandatory" not in done.err


@pytest.mark.parametrize(
    "text", ["Why?", "a, b: {c} (d)", 'it\'s "quoted"', "a\\", 'b\\"', "${c}", "=x", "[1]", "two\nlines", "ünï ✓"]
)
def test_free_text_reaches_the_command_as_it_is(text):
    (override,) = OverridesParser.create().parse_overrides([quoted(f"prompt={text}")])
    config = OmegaConf.create({"prompt": None})
    OmegaConf.update(config, "prompt", override.value())
    assert config.prompt == text


def test_other_overrides_and_quoted_ones_are_left_alone():
    for argument in (
        "prompt=null",
        "prompt='x, y'",
        'prompt="x"',
        "draft=runs/x",
        "decoders=[a,b]",
        "--help",
        "prompt=",
    ):
        assert quoted(argument) == argument


def test_a_folder_with_a_comma_is_one_value(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss=hass,depth=3").symlink_to(run_dir)
    word = quoted_path("draft=loss=hass,depth=3")
    (override,) = OverridesParser.create().parse_overrides([word])
    assert (override.key_or_group, override.value()) == ("draft", "loss=hass,depth=3")
    assert not override.is_sweep_override()
    for other in ("seed=0,1", "model/loss=eagle,hass", "drafts=[loss=hass,depth=3]", "draft=loss=hass"):
        assert quoted_path(other) == other


def test_the_console_script_answers_without_imports_that_it_does_not_need(run_dir, chat, tmp_path, cache_dir):
    code = (
        "import sys\nfrom hass_lightning.commands import scripts\nscripts.generate()\n"
        "print({'lightning', 'deepspeed', 'wandb', 'plotly', 'datasets'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, f"draft={run_dir}", "prompt=Why, and how?", "max_new_tokens=4", "output=json"]
    environment = command_environment(tmp_path, cache_dir)
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, imported = done.stdout.splitlines()
    assert json.loads(said)["answer"] == chat.generate("Why, and how?", 4).text
    assert imported == "set()"  # they are a third of the time before the first token
    assert not foreign_lines(done.stderr)


def test_the_comment_next_to_a_key():
    text = "a: 1  # one\nb:\n  c: x # two words\n  d: ???\ne: 'y # no comment'\nf: [1, 2]   # list\n"
    keys = parse_conf(Path("a.yaml"), text).keys
    comments = {name: key.comment for name, key in keys.items() if key.comment}
    assert comments == {"a": "one", "b.c": "two words", "f": "list"}
    assert "vllm" in comment_of("export", "format")
    assert comment_of("train", "data.source.path", (("data", "jsonl"),)).startswith("the file")
    assert comment_of("a_config_of_another_package", "key") == ""
