"""Every variant of the kernels against products in float64 and against the unpacking of PyTorch."""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch

from secateur.packing.layout import Entry
from secateur.packing.pack import Setting, count, entries_for, pack
from secateur.packing.unpack import row_starts, unpack

kernels = pytest.importorskip("secateur_kernels", reason="secateur-kernels is not installed: make kernels")
VARIANTS = [
    pytest.param(name, marks=[] if runs else pytest.mark.skip(reason=f"this CPU cannot run {name}"))
    for name, runs in kernels.variants().items()
]
LAYOUTS = [(16, 0, "bfloat16"), (16, 0, "float16"), (8, 0, ""), (8, 64, ""), (4, 64, ""), (4, 128, ""), (4, 0, "")]


@pytest.fixture(params=VARIANTS)
def variant(request):
    kernels.use(request.param)
    assert kernels.variant() == request.param
    yield request.param
    kernels.use(None)


@functools.cache
def packed(kind, rows, columns, layout, density=0.5, bias=True, seed=0):
    """A random matrix, one for all variants: entry, tensors, description, its numbers in float64, bias, starts."""
    bits, group_size, dtype = layout
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "2:4":
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        weight = weight * (order < 2).reshape(rows, columns)
    elif kind == "mask":
        weight = weight * (torch.rand(rows, columns, generator=generator) < density)
    counted = count(weight, Setting(bits, group_size, dtype))
    entry: Entry = entries_for(counted, Setting(bits, group_size, dtype))[kind]
    tensors = pack(weight, entry)
    starts = row_starts(entry, tensors)
    added = torch.randn(rows, generator=generator) if bias else None
    matrix = kernels.describe(
        kind,
        rows,
        columns,
        bits,
        tensors["values"],
        group_size=group_size,
        pattern=tensors.get("mask" if kind == "mask" else "index"),
        scales=tensors.get("scales"),
        starts=starts if kind == "mask" else None,
        bias=added,
    )
    return entry, tensors, matrix, unpack(entry, tensors, torch.float32).double(), added, starts


def bound(weight, x, exact, bits, activations):
    """How far a product may be off: rounding of sums in float32, of the result, and of activations to 8 bits."""
    allowed = 1e-6 + 1e-5 * (x.double().abs() @ weight.abs().T) + exact.abs() * torch.finfo(x.dtype).eps
    if bits < 16 and activations != "float":
        step = x.double().abs().amax(1, keepdim=True) / 127  # of groups it is no larger
        allowed = allowed + 0.51 * step * weight.abs().sum(1)
    return allowed


def check(made, x, activations, threads):
    entry, _, matrix, weight, bias, _ = made
    out = torch.full((len(x), entry.rows), torch.nan, dtype=x.dtype)
    kernels.linear(matrix, x, out, kernels.ACTIVATIONS[activations], threads)
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert (out.double() - exact).abs().le(bound(weight, x, exact, entry.bits, activations)).all()


@pytest.mark.parametrize("kind", ["mask", "2:4", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}{layout[2]}g{layout[1]}")
def test_products_are_those_of_float64(variant, kind, layout):
    turn = itertools.count()
    for columns in (4, 60, 64, 68, 128, 132, 324) if kind == "2:4" else (1, 2, 63, 64, 65, 127, 130, 321):
        rows = (1, 3, 5, 6)[next(turn) % 4]
        made = packed(kind, rows, columns, layout, seed=columns)
        for activations in ["float"] if layout[0] == 16 else kernels.ACTIVATIONS:
            tokens = (1, 2, 3, 4, 5, 8, 9)[next(turn) % 7]
            dtype = (torch.float32, torch.bfloat16, torch.float16)[next(turn) % 3]
            generator = torch.Generator().manual_seed(columns)
            check(made, torch.randn(tokens, columns, generator=generator).to(dtype), activations, 1)


@pytest.mark.parametrize("layout", LAYOUTS[:1] + LAYOUTS[2:3] + LAYOUTS[4:5], ids=["16", "8", "4"])
def test_all_tails_and_densities(variant, layout):
    densities = itertools.cycle([0.0, 0.03, 0.5, 0.97, 1.0])
    for columns in range(1, 131):
        made = packed("mask", 3, columns, layout, next(densities), seed=columns)
        check(made, torch.randn(1, columns), "float" if columns % 2 else "int8-group", 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}{layout[2]}g{layout[1]}")
@pytest.mark.parametrize("kind", ["mask", "2:4", "dense"])
def test_unpacking_is_bit_equal_to_pytorch(variant, kind, layout):
    for columns in (4, 100, 192, 196):
        entry, tensors, matrix, _, _, starts = packed(kind, 7, columns, layout, 0.4)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(5, columns, dtype=dtype)
            kernels.unpack(matrix, 2, 7, out)
            assert torch.equal(out, unpack(entry, tensors, dtype, starts)[2:])


def test_threads_change_no_bit(variant):
    made = packed("mask", 331, 640, (8, 0, ""))
    x, outs = torch.randn(3, 640), []
    for threads in (1, 2, 3):
        out = torch.empty(3, 331)
        kernels.linear(made[2], x, out, kernels.ACTIVATIONS["int8-token"], threads)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    check(made, x, "int8-token", 2)


def test_matrices_side_by_side_are_those_one_by_one(variant):
    made = [
        packed("mask", 70, 700, (8, 0, "")),
        packed("2:4", 5, 700, (16, 0, "bfloat16")),
        packed("dense", 33, 700, (4, 64, "")),
    ]
    x, joint, alone = torch.randn(2, 700), torch.empty(2, 108), []
    kernels.linear_many([one[2] for one in made], x, joint, kernels.ACTIVATIONS["int8-group"], 2)
    for one in made:
        alone.append(torch.empty(2, one[0].rows))
        kernels.linear(one[2], x, alone[-1], kernels.ACTIVATIONS["int8-group"], 1)
    assert torch.equal(joint, torch.cat(alone, 1))


def test_activations_that_are_no_numbers_do_not_vanish(variant):
    made = packed("mask", 4, 130, (8, 0, ""), 1.0)
    for activations in kernels.ACTIVATIONS.values():
        x = torch.randn(2, 130)
        x[1, 77] = torch.nan
        out = torch.empty(2, 4)
        kernels.linear(made[2], x, out, activations, 1)
        assert torch.isfinite(out[0]).all()
        assert torch.isnan(out[1]).all()
    # Zeros have no scale, and are zero all the same.
    out = torch.empty(1, 4)
    kernels.linear(made[2], torch.zeros(1, 130), out, kernels.ACTIVATIONS["int8-group"], 1)
    assert torch.equal(out[0], made[4])


def test_a_forked_process_computes_the_same():
    code = (
        "import os, torch, secateur_kernels as k\n"
        "from tests.kernels.test_products import packed\n"
        "made = packed('mask', 400, 640, (8, 0, '')); x = torch.ones(1, 640)\n"
        "def run():\n"
        "    out = torch.empty(1, 400); k.linear(made[2], x, out, 1, 2); return out\n"
        "before = run(); child = os.fork()\n"
        "same = torch.equal(run(), before)\n"
        "if child == 0: os._exit(0 if same else 1)\n"
        "assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_place_of_the_highest_number(variant, dtype):
    generator = torch.Generator().manual_seed(0)
    for size in (*range(1, 140), 2047, 2048, 2049, 6000):
        x = torch.randn(size, generator=generator).to(dtype)
        assert kernels.highest(x) == int(x.argmax())
        x[torch.randint(size, (size // 2,), generator=generator)] = 9.0  # the first of several
        assert kernels.highest(x) == int((x == x.max()).nonzero()[0])
        place = int(torch.randint(size, (), generator=generator))
        x[place] = float("nan")
        assert kernels.highest(x) == place
    assert kernels.highest(torch.full((1, 1, 100), -torch.inf, dtype=dtype)) == 0
    for bad in (torch.empty(0), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 4).T[1:]):
        with pytest.raises(kernels.KernelError):
            kernels.highest(bad)
