"""One token through several blocks at once against the blocks one by one, with the attention of PyTorch between."""

import pytest
import torch
from torch.nn import functional

from tests.kernels.test_blocks import GROUPS, HEAD, HIDDEN, INNER, LAYOUTS, made_of, normed
from tests.kernels.test_products import VARIANTS, packed

kernels = pytest.importorskip("secateur_kernels", reason="secateur-kernels is not installed: make kernels")
pytestmark = pytest.mark.skipif(not hasattr(kernels, "Decoder"), reason="secateur-kernels is older than this test")
TOKENS, ROTATED, WINDOW, HEADS = 70, 8, 5, 6
SHAPES = [(HEADS * HEAD, HIDDEN), (GROUPS * HEAD, HIDDEN), (GROUPS * HEAD, HIDDEN), (HIDDEN, HEADS * HEAD),
          (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]  # fmt: skip
FLOAT = kernels.ACTIVATIONS["float"]


@pytest.fixture(params=VARIANTS)
def variant(request):
    kernels.use(request.param)
    yield request.param
    kernels.use(None)


def made(layout=LAYOUTS[1]):
    """Two blocks, the second without rotation, the norm and the head."""
    matrices, _, norms = made_of(layout, shapes=SHAPES)
    block = kernels.Block(matrices, norms, HEAD)
    head = packed("dense", 21, HIDDEN, layout, seed=30)[2]
    return block, norms[0], head


def cache_of(dtype, windows=(WINDOW, 0), tokens=TOKENS):
    generator = torch.Generator().manual_seed(7)
    shape = (GROUPS, tokens, HEAD)
    layers = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), 0, window) for window in windows]
    cosines, sines = torch.randn(2, tokens, ROTATED, generator=generator).to(dtype)
    return kernels.Cache(layers, cosines, sines), layers, cosines, sines


@pytest.mark.parametrize("layout", LAYOUTS, ids=["16", "8", "4"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_blocks_at_once_are_those_one_by_one(variant, layout, dtype, near):
    block, norm, head = made(layout)
    scale = 0.01  # so that no score stands alone
    decoder = kernels.Decoder([kernels.Layer(block, ROTATED, scale), kernels.Layer(block, 0, scale)], norm, head)
    cache, layers, cosines, sines = cache_of(dtype)
    generator = torch.Generator().manual_seed(8)
    for token in range(TOKENS):
        x = torch.randn(HIDDEN, generator=generator).to(dtype)
        out = torch.full((21,), torch.nan, dtype=dtype)
        decoder.step(cache, x, out, FLOAT, 1 + token % 2)
        if token not in (0, 1, WINDOW, TOKENS - 1):
            continue
        for (keys, values, _, window), rotated in zip(layers, (ROTATED, 0), strict=True):
            mixed = torch.empty(block.rows, dtype=dtype)
            turns = (one[token, :rotated].contiguous() for one in (cosines, sines))
            block.before(x, *turns, mixed, FLOAT)
            query, key, value = mixed.view(-1, HEAD).split((HEADS, GROUPS, GROUPS))
            first = max(0, token + 1 - window) if window else 0
            torch.testing.assert_close(keys[:, token].float(), key.float(), rtol=near, atol=near)
            torch.testing.assert_close(values[:, token].float(), value.float(), rtol=near, atol=near)
            of_head = torch.arange(len(query)) // (len(query) // GROUPS)
            attended = functional.scaled_dot_product_attention(
                query[:, None].double(), keys[of_head, first : token + 1].double(),
                values[of_head, first : token + 1].double(), scale=scale,
            )  # fmt: skip
            after = torch.empty(HIDDEN, dtype=dtype)
            block.behind(attended.flatten().to(dtype), x, after, FLOAT)
            x = after
        wanted = torch.empty(1, 21, dtype=dtype)
        kernels.linear(head, normed(x.double(), norm)[None].to(dtype), wanted, FLOAT)
        assert (out - wanted[0]).abs().max() <= near * wanted.abs().max()
    with pytest.raises(kernels.KernelError, match="room"):
        decoder.step(cache, x, out)


def test_what_does_not_fit_is_refused():
    block, norm, head = made()
    layer = kernels.Layer(block, ROTATED, 1.0)
    for layers, of_norm, of_head in (
        ([], norm, head), ([layer], (norm[0][1:], 1e-5), head), ([layer], norm, packed("dense", 5, 64, LAYOUTS[1])[2]),
    ):  # fmt: skip
        with pytest.raises(kernels.KernelError):
            kernels.Decoder(layers, of_norm, of_head)
    decoder = kernels.Decoder([layer, layer], norm, None)
    cache, layers, cosines, sines = cache_of(torch.float32)
    x, out = torch.ones(HIDDEN), torch.ones(HIDDEN)
    decoder.step(cache, x, out)
    for wrong in ((cache, x[1:], out), (cache, x, out[1:]), (cache, x.double(), out), (cache, x, out.half()),
                  (cache_of(torch.float32, windows=(0,))[0], x, out)):  # fmt: skip
        with pytest.raises(kernels.KernelError):
            decoder.step(*wrong)
    with pytest.raises(kernels.KernelError, match="range"):
        kernels.Decoder([kernels.Layer(block, HEAD + 2, 1.0)], norm, None).step(
            kernels.Cache(layers[:1], torch.ones(1, HEAD + 2), torch.ones(1, HEAD + 2)), x, out
        )
    keys, values = layers[0][:2]
    for given, turns in (
        ([(keys, values, 1, 0)], (cosines, sines)),
        ([(keys, values[:, 1:], 0, 0)], (cosines, sines)),
        ([(keys, values, 0, -1)], (cosines, sines)),
        ([(keys.double(), values, 0, 0)], (cosines, sines)),
        ([(keys.transpose(0, 1), values.transpose(0, 1), 0, 0)], (cosines[:1], sines[:1])),
        ([(keys, values, 0, 0)], (cosines, sines[1:])),
    ):
        with pytest.raises(kernels.KernelError):
            kernels.Cache(given, *turns)
