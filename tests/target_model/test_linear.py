"""FrozenWeight equals nn.Linear and uses the chosen kernel."""

import gc
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hass_lightning.target_model import kernels, linear
from hass_lightning.target_model.kernels import ROW_CLASSES, Choice
from hass_lightning.target_model.linear import FrozenLinear, FrozenWeight, freeze_linears

FEW_ROWS = Choice(packed=ROW_CLASSES[1:])
needs_packing = pytest.mark.skipif(not kernels.can_pack(torch.float32), reason="oneDNN is not in this torch")


@pytest.fixture
def chosen(monkeypatch):
    """Set the choice for every weight."""

    def choose(choice):
        monkeypatch.setattr(linear, "choose", lambda weight, reorder=False: choice)

    choose(FEW_ROWS)
    return choose


@needs_packing
@pytest.mark.parametrize(
    "shape", [(1, 5), (2, 5), (1, 3, 5), (2, 4, 5), (7, 5), (64, 5), (65, 5), (0, 5), (5,)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("choice", [FEW_ROWS, Choice(packed=ROW_CLASSES), Choice()], ids=str)
def test_result_equals_f_linear(chosen, shape, bias, choice):
    chosen(choice)
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    found = FrozenWeight(weight, b)(x)
    torch.testing.assert_close(found, F.linear(x, weight, b), atol=1e-6, rtol=1e-5)
    assert found.is_contiguous()
    with torch.inference_mode():
        torch.testing.assert_close(FrozenWeight(weight.clone(), b)(x), found, atol=1e-6, rtol=1e-5)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_bitwise_equal_if_packed(chosen, dtype):
    if not kernels.can_pack(dtype):
        pytest.skip(f"this processor cannot pack {dtype}")
    torch.manual_seed(0)
    x, weight = torch.randn(8, 128, dtype=dtype), torch.randn(96, 128, dtype=dtype)
    assert FrozenWeight(weight).takes_packed(x)
    if dtype == torch.bfloat16:
        assert torch.equal(FrozenWeight(weight)(x), F.linear(x, weight))
    torch.testing.assert_close(FrozenWeight(weight)(x), F.linear(x, weight))


@needs_packing
def test_non_contiguous_inputs(chosen):
    x, weight = torch.randn(6, 10), torch.randn(9, 5)
    torch.testing.assert_close(FrozenWeight(weight)(x[::2, ::2]), F.linear(x[::2, ::2], weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "few"), [(0, False), (1, False), (2, True), (64, True), (65, False)])
def test_kernel_depends_on_the_number_of_rows(chosen, rows, few):
    assert FrozenWeight(torch.zeros(4, 3)).takes_packed(torch.zeros(rows, 3)) == few


def test_training_uses_the_library_kernel(chosen):
    x, weight = torch.zeros(4, 3), torch.zeros(4, 3)
    frozen = FrozenWeight(weight.clone().requires_grad_())
    assert not frozen.takes_packed(x)
    assert not FrozenWeight(weight).takes_packed(x.clone().requires_grad_())
    with torch.no_grad():
        assert frozen.takes_packed(x)
        assert FrozenWeight(weight).takes_packed(x.clone().requires_grad_())


def test_weight_is_stored_inputs_first_if_chosen(chosen):
    weight = torch.randn(4, 3)
    assert FrozenWeight(weight, reorder=True).plain is weight
    chosen(Choice(inputs_first=True))
    assert FrozenWeight(weight).plain is weight  # its memory may be shared
    turned = FrozenWeight(weight, reorder=True)
    assert torch.equal(turned.plain, weight) and turned.plain.T.is_contiguous()
    x = torch.randn(2, 3)
    torch.testing.assert_close(turned(x), F.linear(x, weight), atol=1e-6, rtol=1e-5)


@needs_packing
def test_modified_weight_is_packed_again_and_deleted_weight_is_released(chosen):
    x, weight = torch.randn(2, 5), torch.randn(9, 5)
    frozen = FrozenWeight(weight)
    frozen(x)
    weight.mul_(2)  # as by an optimizer step or a loaded checkpoint
    torch.testing.assert_close(frozen(x), F.linear(x, weight), atol=1e-6, rtol=1e-5)
    weight.data = torch.randn(9, 5)  # new storage with the same version
    torch.testing.assert_close(frozen(x), F.linear(x, weight), atol=1e-6, rtol=1e-5)
    assert weight in linear._copies
    count = len(linear._copies)
    del weight, frozen
    gc.collect()
    assert len(linear._copies) == count - 1


@needs_packing
def test_users_of_one_weight_share_its_packed_copy(chosen):
    weight = torch.randn(9, 5)
    assert FrozenWeight(weight).packed is FrozenWeight(weight).packed


@needs_packing
def test_released_weight_keeps_only_the_packed_copy(chosen):
    chosen(Choice(packed=ROW_CLASSES))
    weight = torch.randn(9, 5)
    frozen = FrozenWeight(weight)
    assert frozen.extra_bytes == weight.nbytes
    frozen.release()
    assert frozen.plain is None and frozen.extra_bytes == 0
    assert torch.equal(frozen.dense(), weight)
    x = torch.randn(100, 5)
    torch.testing.assert_close(frozen(x), F.linear(x, weight), atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError, match="released"):
        deepcopy(frozen)


@needs_packing
def test_freeze_linears_converts_in_place_without_copies(chosen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False))).requires_grad_(False)
    weights = [p.data_ptr() for p in model.parameters()]
    names = list(model.state_dict())
    plain, x = deepcopy(model), torch.randn(2, 3)
    freeze_linears(model)
    assert all(isinstance(each, FrozenLinear) for each in (model[0], model[1][0]))
    assert [p.data_ptr() for p in model.parameters()] == weights
    assert list(model.state_dict()) == names
    count = len(linear._copies)
    torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-5)
    assert len(linear._copies) == count + 2
    torch.testing.assert_close(deepcopy(model)(x), plain(x), atol=1e-6, rtol=1e-5)
    # another dtype, which cannot be packed: the same parameters with new storage
    chosen(Choice())
    torch.testing.assert_close(model.double()(x.double()), plain.double()(x.double()))
