"""The commands of README and docs run in the order of the pages, in one folder.

Sizes are replaced, and targets, data and paths that need a GPU or the hub. Commands that cannot run here are listed
with reasons. tests/test_readme.py composes every line unchanged.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from hass_lightning.runs.names import run_name
from test_readme import README, ROOT, commands
from test_studies import overrides as cells_of

TASKS = ("doctor", "reproduce", "ablate", "sweep", "compare", "export", "low_acceptance", "served", "gap", "explain")
EXTEND = ("loss", "target", "data", "decoder")
ORDER = ["index", *(f"tasks/{name}" for name in TASKS), "serving", *(f"extend/{name}" for name in EXTEND)]
CANNOT = {
    "trainer.devices=8": "eight GPUs (sweep.md tries DeepSpeed with two CPU processes)",
    "hparams_search=equal_compute": "36 runs of other depths; tests/test_studies.py builds each cell",
    "hparams_search=data_fraction": "24 runs; tests/test_studies.py builds each cell",
    "hparams_search=detach_vs_bptt": "12 runs; study=bptt is the same question",
    "hparams_search=eagle3_parts": "16 runs; tests/test_studies.py builds each cell",
    "hparams_search=heads": "its layers of the default target; tests/test_studies.py runs a small version",
    "hparams_search=loss_variants": "12 runs; study=divergences is the same question",
}
MODULES = {"import": "import_head"}
TINY = ("data.num_validation=4", "data.batch_size=4", "data.max_length=512")
TRAIN = (*TINY, "data.max_answer_tokens=null", "model.draft.vocab_size=64", "trainer.max_epochs=-1",
         "trainer.devices=1", "trainer.precision=32-true", "logger=csv")  # fmt: skip
FEW = ("num_prompts=1", "num_checked=1", "max_new_tokens=8")
DECODE = tuple(f"callbacks.decoding.{word}" for word in FEW)
ANSWERS = ("data.source.max_tokens=16", "data.source.num_questions=12")
OWN_WORDS = ("data.source.num_questions=8", "data.source.num_validation=4", "data.source.question_max_tokens=12",
             "data.source.answer_max_tokens=16", "+data.source.keep_unfinished_questions=true")  # fmt: skip
PROCESSES = ("hydra.launcher", "trainer.devices=2", "trainer=ddp_cpu", "hparams_search")  # otherwise in this process


def lines():
    pages = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ORDER)]
    return list(dict.fromkeys(line for page in pages for line in commands(page)))


def few_cells(words, num):
    """Return a sweep reduced to `num` cells: the first values of one axis, the first value of each other."""
    kept = []
    for word in words:
        if word.startswith("hparams_search="):  # its first cells, in the folder of its own name
            cells = [dict(each.split("=", 1) for each in cell) for cell in cells_of(word.split("=")[1])[:num]]
            kept.append(f"study={word.split('=')[1]}_small")
            kept += [f"{key}={','.join(dict.fromkeys(cell[key] for cell in cells))}" for key in cells[0]]
            continue
        key, value = word.split("=", 1)
        values = re.findall(r"\[[^]]*\]|[^,\[\]]+", value)
        kept.append(f"{key}={','.join(values[:num])}" if len(values) > 1 else word)
        num = 1 if len(values) > 1 else num
    return kept


def small(program, words, tiny):
    """Return the same command for two CPU cores and the tiny target."""
    if "--cfg" in words or "cache=list" in words or program in ("report", "import"):
        return words
    named = [word for word in words if word.startswith(("target=", "experiment=reproduce/"))]
    own_file = any(word.startswith("data.source.path=") for word in words)
    sweep, plan = "-m" in words, "plan=true" in words
    if plan and named:  # its sizes are in its YAML
        return words
    changed = [re.sub(r"^benchmarks=.*", "benchmarks=[smoke]", word) for word in words if word != "-m"]
    changed = [word.replace("paper_ablation_full", "paper_ablation_small") for word in changed]
    if sweep and not plan:
        changed = few_cells(changed, 1 if any("hydra.launcher" in w or "ddp" in w for w in words) else 2)
        in_here = not any(part in word for word in words for part in PROCESSES)
        changed = ["-m", *changed, *(["hydra/launcher=basic"] if in_here else [])]
    elif sweep:
        changed = ["-m", *changed]
    if not named:
        changed += [] if "experiment=smoke" in words else ["target=tiny"]
    else:  # the YAML of that target, with a small model at its path
        changed = [word for word in changed if not word.startswith("target.path=")]
        changed += [f"target.path={tiny.folder}", "target.dtype=float32", "++target.device=cpu", "++target.sizes=null"]
    if program == "export":
        return changed
    if program == "generate":  # the head of the quickstart, whose run folder names the target
        given = "".join(words)
        return [*(word for word in words if not word.startswith("prompt=")), "prompt=Why?", "max_new_tokens=8",
                *([] if "draft=" in given else ["draft=runs/quickstart"])]  # fmt: skip
    if program == "doctor":  # text generated by a random model is not worth checking
        changed = [word for word in changed if word != "data=self_distilled"]
    if any(word.startswith("experiment=reproduce/") for word in words):
        changed += ["data=jsonl", "data.source.path=chats.jsonl", "trainer=cpu"]
    elif "data=self_distilled" in changed:
        changed += OWN_WORDS
    elif "data=questions" in changed:
        changed += ANSWERS
    elif not own_file:
        doctor = ["data=jsonl", "data.source.path=chats.jsonl"]
        changed += doctor if program == "doctor" else ["data=smoke"]
    if program == "benchmark":
        num = 8 if "tune=true" in words else 2  # a quarter of them, at least two, is used for tuning
        sizes = (f"limit={num}", f"data.num_validation={max(4, num)}", "skip=0", "max_new_tokens=8", "num_checked=1")
        return [*changed, *TINY, *sizes]
    if plan:
        return [*changed, *TINY]
    two = "trainer.devices=2" in words or "trainer=ddp_cpu" in words
    changed += [word for word in TRAIN if not (two and word == "trainer.devices=1")]
    if any(word.startswith("experiment=reproduce/") for word in words):  # the system prompt, one token per character
        changed.append("data.max_length=2048")
    changed += [] if "callbacks.decoding=null" in words else DECODE
    if program == "doctor":
        return [*changed, "trainer.max_steps=2", "overfit_steps=0", "num_samples=20"]
    if program == "train":  # after initialization by least squares, q and k have no gradient in the first steps
        changed.append(f"trainer.max_steps={2 if sweep else 6}")
        if not sweep and not any(word.startswith("paths.run_dir=") for word in words):
            changed.append(f"paths.run_dir=runs/{run_name(','.join(words))}")  # the folder of the unchanged line
    return changed


def prepare_folder(folder):
    """Write the reader's own files that the pages mention: chats, and the loss term of docs/extend/loss.md."""
    chats = [
        [("user", f"What is {n} plus {n}, please?"), ("assistant", f"It is {2 * n}, of course.")] for n in range(24)
    ]
    records = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    asked = [{"id": n, "question": f"What is {n} plus {n}, please?"} for n in range(24)]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(record) for record in asked))
    metrics = re.search(r"```text\n(.*?)```", (ROOT / "docs/tasks/served.md").read_text(), flags=re.DOTALL).group(1)
    (folder / "metrics.txt").write_text(metrics)
    paper = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/tasks/gap.md").read_text(), flags=re.DOTALL).group(1)
    (folder / "paper.yaml").write_text(paper)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/extend/loss.md").read_text(), flags=re.DOTALL).group(1)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "losses.py").write_text(code)
    (folder / "my_package" / "__init__.py").write_text("from my_package.losses import ReverseKL as MyTerm\n")


def test_commands_that_cannot_run_here_are_in_the_pages_and_few():
    found = lines()
    for part in CANNOT:
        assert any(part in line for line in found), part
    assert sum(any(part in line for part in CANNOT) for line in found) < 0.15 * len(found)


def test_sweep_is_reduced_to_its_first_cells():
    words = ["model/loss=eagle,hass", "model.alignment.step_weights=[1,1],[1,0.5]", "study=x", "seed=0,1"]
    assert few_cells(words, 2) == [words[0], "model.alignment.step_weights=[1,1]", "study=x", "seed=0"]
    assert few_cells(["hparams_search=top_k"], 2) == [
        "study=top_k_small", "model.loss.terms.top_k={weight:0},{k:1,weight:0.1}",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)  # about a hundred commands, each with its own start-up
def test_the_commands_of_the_pages_run_in_their_order(call_command, run_command, tiny, tmp_path, monkeypatch):
    prepare_folder(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    log, broken = tmp_path / "walk.log", []  # the log shows the progress

    def run(program, words, apart=False):
        done = (run_command if apart else call_command)(MODULES.get(program, program), *words)
        said = f"{done.code} {shlex.join([f'hass-{program}', *words])}\n"
        if done.code:
            said += "".join(f"    {line}\n" for line in [*done.out.splitlines()[-2:], *done.err.splitlines()[-8:]])
            broken.append(said)
        with log.open("a") as file:
            file.write(said)

    run("train", small("train", ["experiment=hass"], tiny))  # one of the cells of the README's second line
    for line in lines():
        if any(part in line for part in CANNOT):
            continue
        program, *words = shlex.split(line, comments=True)
        program = program.removeprefix("hass-")
        # a folder of that name replaces the repository on the hub
        if program == "import" and not Path("HArmonizedSS").exists():
            given = "output_dir=HArmonizedSS/HASS-LLaMA3-Instruct-8B"
            run("export", ["target=tiny", "draft=runs/quickstart", "format=eagle", given])
        plan = "plan=true" in words
        run(program, small(program, words, tiny), not plan and any(part in line for part in PROCESSES))
    assert not broken, "\n".join(broken)
