"""The kernel for few rows gives what nn.Linear gives, and only where it is meant to be used."""

import gc
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hass_lightning.target import linear as module
from hass_lightning.target.linear import FewRowLinear, inputs_first, linear, takes_few_rows, use_few_row_linears


@pytest.fixture
def without_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 5), (1, 3, 5), (2, 4, 5), (7, 5), (64, 5), (65, 5), (0, 5), (5,)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_ordinary_product(without_avx512, shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    found = linear(x, weight, b)
    torch.testing.assert_close(found, F.linear(x, weight, b), atol=1e-6, rtol=1e-5)
    assert found.is_contiguous()
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight.clone(), b), found, atol=1e-6, rtol=1e-5)


def test_rows_that_are_a_slice_of_more(without_avx512):
    x, weight = torch.randn(6, 10), torch.randn(9, 5)
    torch.testing.assert_close(linear(x[::2, ::2], weight), F.linear(x[::2, ::2], weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "few"), [(0, False), (1, True), (64, True), (65, False)])
def test_many_rows_take_the_library_kernel(without_avx512, rows, few):
    assert takes_few_rows(torch.zeros(rows, 3), torch.zeros(4, 3)) == few


def test_one_row_takes_it_where_it_is_at_the_memory_s_speed(without_avx512, monkeypatch):
    wide, narrow = torch.randn(4, 3), torch.randn(3, 4)
    turned = inputs_first(wide)
    assert torch.equal(turned, wide) and turned.T.is_contiguous()
    assert inputs_first(narrow) is narrow
    assert [takes_few_rows(torch.zeros(1, w.shape[1]), w) for w in (wide, turned, narrow)] == [True, False, False]
    x = torch.randn(2, 3)
    torch.testing.assert_close(linear(x, turned), F.linear(x, wide), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert inputs_first(wide) is wide


def test_other_dtypes_training_and_avx512_take_the_library_kernel(without_avx512, monkeypatch):
    x, weight = torch.zeros(4, 3), torch.zeros(4, 3)
    assert not takes_few_rows(x.bfloat16(), weight.bfloat16())
    assert not takes_few_rows(x.double(), weight.double())
    assert not takes_few_rows(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert takes_few_rows(x, weight.clone().requires_grad_())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not takes_few_rows(x, weight)


def test_a_weight_that_changes_is_packed_anew_and_one_that_is_gone_is_forgotten(without_avx512):
    x, weight = torch.randn(2, 5), torch.randn(9, 5)
    linear(x, weight)
    weight.mul_(2)  # an optimizer step, a loaded checkpoint
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-6, rtol=1e-5)
    assert weight in module._packed
    count = len(module._packed)
    del weight
    gc.collect()
    assert len(module._packed) == count - 1


def test_layers_are_turned_in_place_and_nothing_of_them_is_copied(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    weights = [p.data_ptr() for p in model.parameters()]
    names = list(model.state_dict())
    use_few_row_linears(model)
    assert all(isinstance(each, FewRowLinear) for each in (model[0], model[1][0]))
    assert [p.data_ptr() for p in model.parameters()] == weights
    assert list(model.state_dict()) == names
    called = []
    monkeypatch.setattr(module, "linear", lambda x, weight, bias: called.append(1) or F.linear(x, weight, bias))
    deepcopy(model)(torch.zeros(2, 3))
    assert len(called) == 2
