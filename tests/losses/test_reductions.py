"""The compiled loss equals the eager one for every objective of conf/model/loss; fallback to eager."""

import logging
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TargetRows, TopK, reductions
from hass_lightning.losses.reductions import CompiledPasses, Compiler, EagerPasses
from hass_lightning.runs.config import config_folder
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from live_tensors import Shapes

R, D, V = 37, 16, 301
LOSSES = sorted(path.stem for path in (Path(config_folder()) / "model" / "loss").glob("*.yaml"))


@pytest.fixture
def as_written(monkeypatch):
    """Replace the compiled functions by the plain Python ones."""
    monkeypatch.setattr(reductions, "_compiled", lambda: (reductions._reductions, reductions._gradient))


def rows(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(R, D, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    target = torch.randn(R, D, generator=generator).to(dtype)
    vocabulary = DraftVocabulary(torch.randn(V, D, generator=generator).to(dtype))
    return steps, target, vocabulary


@lru_cache
def composed(name):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose("train", overrides=[f"model/loss={name}"]).model.loss


def objective(name, compile):
    return instantiate(composed(name), chunk_rows=16, compile=compile)


def outcome(loss, dtype=torch.float32, autocast=False):
    steps, target, vocabulary = rows(dtype)
    wanted = (target @ vocabulary.weight.T).argmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = loss(steps, target, vocabulary, wanted, R, (1.0, 0.5))
    return output, torch.autograd.grad(output.total, steps)


def same(name, tolerance, **how):
    (eager, eager_gradients), (compiled, gradients) = (outcome(objective(name, on), **how) for on in (False, True))
    torch.testing.assert_close(compiled.total, eager.total, rtol=tolerance, atol=tolerance)
    for key, value in eager.values.items():
        torch.testing.assert_close(compiled.values[key], value, rtol=tolerance, atol=tolerance * R)
    for ours, theirs in zip(gradients, eager_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    return compiled, eager


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_functions_match_eager_without_compilation(as_written, name):
    compiled, eager = same(name, 1e-5)
    assert torch.equal(compiled.hits, eager.hits)
    same(name, 1e-12, dtype=torch.float64)
    same(name, 0.02, autocast=True)  # the gradient is rounded to bf16 either way


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_matches_eager(name):
    compiled, eager = same(name, 1e-5)
    assert torch.equal(compiled.hits, eager.hits)
    assert objective(name, True).compiler.on
    same(name, 0.02, autocast=True)


@pytest.mark.slow
def test_other_numbers_of_positions_do_not_recompile(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    torch._dynamo.reset()
    reductions._compiled.cache_clear()
    loss = objective("hass", True)
    steps, target, vocabulary = rows()
    for count in (37, 33, 17, 30, 5):  # chunks of 16, and a last one of 5, 1, 1, 14 and 5 positions
        part = [step[:count] for step in steps]
        loss(part, target[:count], vocabulary, torch.zeros(count).long(), count).total.backward()
        with torch.no_grad():  # validation
            loss(part, target[:count], vocabulary, torch.zeros(count).long(), count)


def test_compiled_logits_stay_in_the_dtype_of_the_product(as_written):
    steps, target, vocabulary = rows()
    terms = {"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK(k=3)}
    seen = {}
    for compile in (False, True):
        loss = DraftLoss(terms, 16, compile=compile)
        with Shapes() as shapes, torch.autocast("cpu", dtype=torch.bfloat16):
            loss(steps, target, vocabulary, torch.zeros(R).long(), R)
        seen[compile] = shapes
    assert seen[True].largest == seen[False].largest == 16 * V
    logits = torch.randn(4, V).bfloat16()
    target = TargetRows(torch.zeros(4, D), torch.randn(4, V))
    own = CompiledPasses(logits, target, torch.empty_like(logits), Compiler(True))
    assert own.gradient(torch.ones(4), None).dtype == own.probs.dtype == torch.bfloat16


def test_hits_with_equal_logits(as_written):
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    target = TargetRows(torch.zeros(2, 1), torch.randn(2, 3))
    wanted = torch.tensor([2, 0])
    assert CompiledPasses(logits, target, torch.empty(2, 3), Compiler(True)).hits(wanted).tolist() == [True, True]
    assert EagerPasses(logits, target, torch.empty(2, 3)).hits(wanted).tolist() == [False, True]


def test_auto_compiles_only_long_runs():
    compiler = Compiler()
    assert not compiler.on
    for device, least in zip(("cpu", "cuda"), reductions.WORTH_COMPILING, strict=True):
        compiler.decide(least, torch.device(device))
        assert compiler.on
        compiler.decide(least - 1, torch.device(device))
        assert not compiler.on
    for mode in (True, False):
        fixed = Compiler(mode)
        fixed.decide(1e30, torch.device("cpu"))
        assert fixed.on is mode
    with pytest.raises(ValueError, match=r"model\.loss\.compile=often is none of auto, true, false"):
        Compiler("often")


def test_failed_compilation_falls_back_to_eager_with_one_warning(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found in cpp.cxx\nand more")

    monkeypatch.setattr(reductions, "_compiled", lambda: (broken, broken))
    (eager, eager_gradients) = outcome(objective("hass", False))
    loss = objective("hass", "auto")
    loss.compiler.on = True
    with caplog.at_level(logging.WARNING, logger=reductions.__name__):
        output, gradients = outcome(loss)
    assert not loss.compiler.on and caplog.text.count("computed eagerly: No working C++ compiler") == 1
    torch.testing.assert_close(output.total, eager.total)
    torch.testing.assert_close(gradients, eager_gradients)
    with pytest.raises(ValueError, match=r"model\.loss\.compile=true: torch\.compile failed \(No working C\+\+"):
        outcome(objective("hass", True))


@pytest.mark.slow
def test_machine_without_a_compiler_uses_eager(tmp_path):
    script = """
import logging, torch
from hass_lightning.losses import DraftLoss, SoftCrossEntropy
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
logging.basicConfig(level=logging.WARNING)
loss = DraftLoss({"ce": SoftCrossEntropy()})
loss.compiler.on = True
step = torch.randn(5, 4, requires_grad=True)
total = loss([step], torch.randn(5, 4), DraftVocabulary(torch.randn(9, 4)), torch.zeros(5).long(), 5).total
total.backward()
print("gradient", bool(step.grad.abs().sum() > 0), loss.compiler.on)
"""
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradient True False" in done.stdout
    assert done.stderr.count("the loss is not compiled") == 1


def test_every_objective_has_compile_auto():
    for name in LOSSES:
        assert composed(name).compile == "auto"
