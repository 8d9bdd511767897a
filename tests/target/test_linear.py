"""The kernel for few rows gives what nn.Linear gives, and only where it is meant to be used."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hass_lightning.target import linear as module
from hass_lightning.target.linear import FewRowLinear, few_row_width, linear, use_few_row_linears


@pytest.fixture
def without_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 5), (1, 3, 5), (2, 4, 5), (7, 5), (16, 5), (17, 5), (0, 5), (5,)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_ordinary_product(without_avx512, shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    found = linear(x, weight, b)
    torch.testing.assert_close(found, F.linear(x, weight, b), atol=1e-6, rtol=1e-5)
    assert found.is_contiguous()


@pytest.mark.parametrize(("rows", "width"), [(1, None), (2, 2), (3, 4), (5, 6), (7, 8), (9, 16), (16, 16), (17, None)])
def test_rows_are_padded_to_a_fast_width(without_avx512, rows, width):
    assert few_row_width(torch.zeros(rows, 3), torch.zeros(4, 3)) == width


def test_other_dtypes_training_and_avx512_take_the_library_kernel(without_avx512, monkeypatch):
    x, weight = torch.zeros(4, 3), torch.zeros(4, 3)
    assert few_row_width(x.bfloat16(), weight.bfloat16()) is None
    assert few_row_width(x.double(), weight.double()) is None
    assert few_row_width(x, weight.clone().requires_grad_()) is None
    with torch.no_grad():
        assert few_row_width(x, weight.clone().requires_grad_()) == 4
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert few_row_width(x, weight) is None


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
