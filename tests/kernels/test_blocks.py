"""One token through a block, but for its attention, against float64."""

import itertools

import pytest
import torch
from torch.nn import functional

from tests.kernels.test_products import VARIANTS, packed

kernels = pytest.importorskip("secateur_kernels", reason="secateur-kernels is not installed: make kernels")
pytestmark = pytest.mark.skipif(not hasattr(kernels, "Block"), reason="secateur-kernels is older than this test")
HIDDEN, INNER, HEAD, HEADS, GROUPS = 72, 100, 12, 5, 2
SHAPES = [(HEADS * HEAD, HIDDEN), (GROUPS * HEAD, HIDDEN), (GROUPS * HEAD, HIDDEN), (HIDDEN, HEADS * HEAD),
          (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]  # fmt: skip
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]
LAYOUTS = [(16, 0, "bfloat16"), (8, 0, ""), (4, 64, "")]
FLOAT = kernels.ACTIVATIONS["float"]


def made_of(layout, bias=True, shapes=SHAPES):
    """The matrices, their numbers in float64, their biases, and the norms."""
    kinds = itertools.cycle(["mask", "2:4", "dense"])
    matrices, weights, biases = [], [], []
    for seed, (rows, columns) in enumerate(shapes):
        _, _, matrix, weight, added, _ = packed(next(kinds), rows, columns, layout, bias=bias, seed=seed)
        matrices.append(matrix)
        weights.append(weight)
        biases.append(0 if added is None else added.double())
    generator = torch.Generator().manual_seed(9)
    norms = [(torch.rand(HIDDEN, generator=generator) + 0.5, epsilon) for epsilon in (1e-5, 0.1)]
    return matrices, dict(zip(NAMES, zip(weights, biases, strict=True), strict=True)), norms


def product(parts, name, x):
    weight, bias = parts[name]
    return weight @ x + bias


def normed(x, norm):
    return x * (x.square().mean() + norm[1]).rsqrt() * norm[0].double()


@pytest.fixture(params=VARIANTS)
def variant(request):
    kernels.use(request.param)
    yield request.param
    kernels.use(None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["16", "8", "4"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.04), (torch.float16, 5e-3)])
def test_a_block_is_that_of_float64(variant, layout, dtype, near):
    matrices, parts, norms = made_of(layout)
    block = kernels.Block(matrices, norms, HEAD)
    generator = torch.Generator().manual_seed(3)
    x, attended, cosines, sines = (
        torch.randn(size, generator=generator).to(dtype) for size in (HIDDEN, HEADS * HEAD, 8, 8)
    )
    out = torch.full((block.rows,), torch.nan, dtype=dtype)
    block.before(x, cosines, sines, out, FLOAT, 2)
    n = normed(x.double(), norms[0])
    query, key, value = (product(parts, name, n) for name in "qkv")

    def turned(rows):
        heads = rows.view(-1, HEAD).clone()
        first, second = heads[:, :4].clone(), heads[:, 4:8].clone()
        heads[:, :4] = first * cosines[:4].double() - second * sines[:4].double()
        heads[:, 4:8] = second * cosines[4:].double() + first * sines[4:].double()
        return heads.flatten()

    wanted = torch.cat([turned(query), turned(key), value])
    assert (out.double() - wanted).abs().max() <= near * wanted.abs().max()

    out = torch.full((HIDDEN,), torch.nan, dtype=dtype)
    block.behind(attended, x, out, FLOAT, 2)
    h = x.double() + product(parts, "o", attended.double())
    n = normed(h, norms[1])
    wanted = h + product(parts, "down", functional.silu(product(parts, "gate", n)) * product(parts, "up", n))
    assert (out.double() - wanted).abs().max() <= near * wanted.abs().max()


def test_silu_at_its_ends():
    """Through matrices that are one: gate and up are what comes in, so that out is h + silu(n) * n."""
    tensors = packed("dense", 64, 64, (16, 0, "bfloat16"), bias=False)[1]
    tensors["values"][: 64 * 64] = torch.eye(64).flatten().bfloat16()
    matrix = kernels.describe("dense", 64, 64, 16, tensors["values"])
    block = kernels.Block([matrix] * 7, [(torch.full((64,), 30.0), 1e-6)] * 2, 64)
    x, out = torch.linspace(-3, 3, 64), torch.empty(64)
    block.behind(torch.zeros(64), x, out)
    n = normed(x.double(), (torch.full((64,), 30.0), 1e-6))
    torch.testing.assert_close(out.double(), x.double() + functional.silu(n) * n, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    matrices, _, norms = made_of(LAYOUTS[1], bias=False)
    for change in ([*matrices[:6], matrices[5]], [matrices[3], *matrices[1:]]):
        with pytest.raises(kernels.KernelError, match="fit"):
            kernels.Block(change, norms, HEAD)
    for head in (0, 7, -12):
        with pytest.raises(kernels.KernelError):
            kernels.Block(matrices, norms, head)
    with pytest.raises(kernels.KernelError, match="norm"):
        kernels.Block(matrices, [norms[0], (torch.ones(3), 1e-5)], HEAD)
    block = kernels.Block(matrices, norms, HEAD)
    x, turn, out = torch.ones(HIDDEN), torch.ones(HEAD), torch.ones(block.rows)
    for wrong in ((x[1:], turn, turn, out), (x, turn, turn, out[1:]), (x, turn, turn.double(), out),
                  (x, turn[1:], turn[1:], out), (x, turn.repeat(2), turn.repeat(2), out)):  # fmt: skip
        with pytest.raises(kernels.KernelError):
            block.before(*wrong)
    with pytest.raises(kernels.KernelError):
        block.behind(torch.ones(3), x, torch.ones(HIDDEN))
