"""Flash and flex attention equal the eager implementation in value and gradient, and need no T x T tensor."""

import pytest
import torch
from transformers import LlamaConfig

from hass_lightning.draft import Alignment, EagleDraft, unroll
from hass_lightning.draft.attention import banded_attention
from live_tensors import Shapes

B, H, G, D = 2, 4, 2, 8


def make_inputs(depth, num_rows, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(B, heads, num_rows, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw(H), [(draw(G), draw(G)) for _ in range(depth)]


def run(form, queries, bands):
    """Return the output, and the gradient of a fixed projection of it with respect to every input."""
    output = banded_attention(queries, bands, form)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    inputs = [queries, *(tensor for band in bands for tensor in band)]
    return output, torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 40])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_flash_matches_eager_in_value_and_gradient(depth, num_rows):
    queries, bands = make_inputs(depth, num_rows)
    expected, found = run("eager", queries, bands), run("flash", queries, bands)
    torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=0)
    for ours, reference in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_rounding_error_is_no_larger_than_eager(dtype):
    queries, bands = make_inputs(3, 40, dtype)
    exact = run("eager", queries.detach().double().requires_grad_(), [
        tuple(tensor.detach().double().requires_grad_() for tensor in band) for band in bands
    ])  # fmt: skip
    errors = {}
    for form in ("eager", "flash"):
        output, gradients = run(form, queries, bands)
        pairs = zip([output, *gradients], [exact[0], *exact[1]], strict=True)
        errors[form] = max(float((a.detach().double() - b.detach()).abs().max()) for a, b in pairs)
    assert 0 < errors["flash"] < 1.5 * errors["eager"]


@pytest.mark.parametrize("depth", [1, 3])
def test_flex_matches_eager_in_value(depth):
    """On a CPU FlexAttention has no backward pass; the test below checks the gradient on a GPU."""
    queries, bands = make_inputs(depth, 20, torch.float32)
    with torch.no_grad():
        bands = [(k.detach(), v.detach()) for k, v in bands]
        found = banded_attention(queries.detach(), bands, "flex")
        torch.testing.assert_close(found, banded_attention(queries, bands, "eager"), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_flex_matches_eager_on_a_gpu():
    queries, bands = make_inputs(3, 200, torch.float32)
    queries = queries.detach().cuda().requires_grad_()
    bands = [tuple(tensor.detach().cuda().requires_grad_() for tensor in band) for band in bands]
    expected, found = run("eager", queries, bands), run("flex", queries, bands)
    torch.testing.assert_close(found[0], expected[0], atol=1e-3, rtol=0)
    for ours, reference in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("form", "square"), [("flash", False), ("eager", True)])
def test_memory_is_linear_in_the_length(form, square):
    length, size = 400, 32
    config = LlamaConfig(
        vocab_size=50, hidden_size=size, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    draft = EagleDraft(config, attention=form)
    rows = torch.randn(2, 1, length, size)
    with Shapes() as shapes:
        sum(f.square().sum() for f in unroll(draft, rows[0], rows[1], Alignment(3))).backward()
    assert (shapes.largest >= 4 * length**2) == square
    assert square or shapes.largest <= 3 * length * 2 * size


def official_softmax(queries, bands):
    """docs/method.md, HCA to the letter: all bands' scores [F, B, H, L, L] times their masks, summed over the bands,
    one softmax in which masked columns stay as exp(0), then the weights times the masks, for L rows a sequence."""
    num_bands, num_rows = len(bands), queries.shape[2]
    keys, values = (torch.stack(each).repeat_interleave(H // G, dim=2) for each in zip(*bands, strict=True))
    masks = torch.zeros(num_bands, 1, 1, num_rows, num_rows, dtype=queries.dtype)
    for row in range(num_rows):
        masks[0, ..., row, : max(0, row - (num_bands - 1) + 1)] = 1
        for band in range(1, num_bands):
            if (column := row - (num_bands - 1 - band)) >= 0:
                masks[band, ..., row, column] = 1
    scores = (torch.einsum("bhrd,fbhcd->fbhrc", queries, keys) / D**0.5 * masks).sum(0)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("fbhrc,fbhcd->bhrd", weights[None] * masks, values)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_leaky_is_the_official_softmax(depth):
    """A sequence of L tokens has L rows there, the last of them padding; here it has the L-1 rows with a target."""
    queries, bands = make_inputs(depth, num_rows=12)
    expected = official_softmax(queries, bands)[:, :, :-1]
    ours = banded_attention(queries[:, :, :-1], [(k[:, :, :-1], v[:, :, :-1]) for k, v in bands], leaky=True)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    inputs = [queries, *(tensor for band in bands for tensor in band)]
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in (ours, expected)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_an_unknown_form_names_the_key():
    with pytest.raises(ValueError, match=r"model\.draft\.attention=sdpa"):
        EagleDraft(LlamaConfig(hidden_size=32, num_attention_heads=4), attention="sdpa")
