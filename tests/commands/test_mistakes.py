"""Error messages for invalid overrides: suggestions, file and line of the key, at most six lines."""

import subprocess

import pytest

from command_environment import command_environment
from hass_lightning.commands.command import take_options
from terminal import check_snapshot, foreign_lines, run_in_terminal, script, wrapped_lines

MISTAKES = {  # the words, and the cure that is named
    "key": ("model.aligment.depth=2", "did you mean model.alignment.depth=2?"),
    "group": ("modle/loss=hass", "did you mean model/loss=hass?"),
    "value": ("data=shargpt", "did you mean data=sharegpt?"),
    "several": ("seed=0,1", "add -m"),
    "bracket": ("data.source.path=[1", "put it in quotes"),
    "no_value": ("fresh", "write fresh=VALUE"),
}
WIDTHS = {"80": 80, "120": 120, "without_terminal": None}


@pytest.mark.parametrize("place", WIDTHS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(tmp_path, cache_dir, name, place):
    environment, columns = command_environment(tmp_path, cache_dir), WIDTHS[place]
    environment.pop("COLUMNS", None)
    (word, cure), start = MISTAKES[name], script("train")
    if columns:
        text, code = run_in_terminal([*start, word], columns, cwd=tmp_path, env=environment)
        assert not wrapped_lines(text, columns)
    else:
        done = subprocess.run(
            [*start, word], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        text, code = done.stderr, done.returncode
        assert not done.stdout
    assert code == 1
    assert 1 <= len(text.strip().splitlines()) <= 6, text
    assert text.startswith("error: ") and "+" not in text and "Traceback" not in text
    key, _, value = word.partition("=")
    assert key in text and value in text and cure in " ".join(text.split())
    assert not foreign_lines(text)
    assert not (tmp_path / "runs").exists()
    check_snapshot(f"mistake_{name}_{place}", text)


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train", ["lr=3"], ["did you mean model.optimizer.lr=3?", "conf/model/default.yaml, line"]),
        ("train", ["trainer.max_epoch=1"], ["trainer.max_epoch=1:", "did you mean trainer.max_epochs=1?"]),
        ("train", ["data=jsonl", "data.source.pth=x"], ["did you mean data.source.path=x?", "conf/data/jsonl.yaml"]),
        ("train", ["experiment=smok"], ["experiment=smok", "did you mean experiment=smoke?", "values: "]),
        ("train", ["target.zzzzzzzzzz=1"], ["target.zzzzzzzzzz", "keys of target: "]),
        ("train", ["~model.los"], ["~model.los:", "did you mean ~model.loss?"]),
        ("train", ["+seed=1"], ["seed", "leave out the +"]),
        ("train", ["seed=1", "output=xml"], ["output=xml", "json"]),
        ("benchmark", ["limits=3"], ["did you mean limit=3?", "conf/benchmark.yaml"]),
        ("report", ["run=x"], ["did you mean runs=x?"]),
    ],
)
def test_what_was_meant(call_command, command, words, said):
    done = call_command(command, *words)
    assert done.code == 1 and done.out == ""
    text = " ".join(done.err.split())  # lines are wrapped for the terminal
    assert [each for each in said if each not in text] == []
    assert len(done.err.strip().splitlines()) <= 6


def test_options_of_the_screen_are_no_part_of_the_config():
    options, words = take_options(["output=json", "seed=1", "verbose=true"])
    assert (options.json, options.verbose, words) == (True, True, ["seed=1"])
    assert take_options(["--json"])[0].json
    with pytest.raises(ValueError, match="verbose=3"):
        take_options(["verbose=3"])
