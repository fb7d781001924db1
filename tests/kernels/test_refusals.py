"""What the kernels refuse before they read anything."""

import os
import subprocess
import sys

import pytest
import torch

kernels = pytest.importorskip("secateur_kernels", reason="secateur-kernels is not installed: make kernels")


def mask_of_two(**changes):
    """A matrix of 2 x 64 with one value in each row, with changes."""
    given = {
        "kind": "mask",
        "rows": 2,
        "columns": 64,
        "bits": 8,
        "values": torch.tensor([3, -5] + [0] * 64, dtype=torch.int8),
        "pattern": torch.tensor([[1], [2]]),
        "scales": torch.ones(2, 1, dtype=torch.bfloat16),
        "starts": torch.tensor([0, 1, 2]),
        **changes,
    }
    return kernels.describe(*[given.pop(key) for key in ("kind", "rows", "columns", "bits", "values")], **given)


def test_what_the_changes_below_start_from_is_accepted():
    out = torch.empty(1, 2)
    kernels.linear(mask_of_two(), torch.arange(1.0, 65.0).unsqueeze(0), out)
    assert out.tolist() == [[3.0, -10.0]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "4:8"}, "4:8"),
        ({"bits": 5}, "5 bits"),
        ({"rows": 0}, "rows 0"),
        ({"columns": 128}, "pattern"),
        ({"columns": 60, "pattern": torch.tensor([[1], [2**62]])}, "broken"),
        ({"pattern": None}, "pattern is missing"),
        ({"pattern": torch.tensor([[1], [2]], dtype=torch.int32)}, "int32"),
        ({"pattern": torch.tensor([[3], [2]])}, "starts"),
        ({"pattern": torch.tensor([[1, 9], [2, 9]])[:, :1]}, "contiguous"),
        ({"values": torch.zeros(65, dtype=torch.int8)}, "starts"),
        ({"values": torch.zeros(63, dtype=torch.int8)}, "padding"),
        ({"values": torch.zeros(66, dtype=torch.uint8)}, "values is torch.uint8"),
        ({"starts": torch.tensor([0, 2, 2])}, "starts"),
        ({"starts": torch.tensor([0, 1, 3])}, "starts"),
        ({"scales": torch.full((2, 1), torch.inf, dtype=torch.bfloat16)}, "finite"),
        ({"scales": torch.ones(2, 2, dtype=torch.bfloat16)}, "scales"),
        ({"group_size": 32, "scales": torch.ones(2, 2, dtype=torch.bfloat16)}, "group size"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"bias": torch.zeros(2, dtype=torch.float64)}, "bias"),
    ],
)
def test_matrices_that_do_not_fit_together(changes, named):
    with pytest.raises(kernels.KernelError, match=named):
        mask_of_two(**changes)


def test_indices_that_do_not_ascend():
    values, scales = torch.zeros(2 + 64, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bfloat16)
    for index, good in ((0b0100, True), (0b0000, False), (0b0001, False), (0b10100, False)):
        pattern = torch.tensor([[index]], dtype=torch.uint8)
        if good:
            kernels.describe("2:4", 1, 4, 8, values, pattern=pattern, scales=scales)
        else:
            with pytest.raises(kernels.KernelError, match="broken"):
                kernels.describe("2:4", 1, 4, 8, values, pattern=pattern, scales=scales)


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.zeros(1, 63), torch.zeros(1, 2)),
        (torch.zeros(1, 64), torch.zeros(1, 3)),
        (torch.zeros(2, 64), torch.zeros(1, 2)),
        (torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.bfloat16)),
        (torch.zeros(1, 64, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)),
        (torch.zeros(64, 2).T, torch.zeros(2, 2)),
    ],
)
def test_products_that_do_not_fit(x, out):
    with pytest.raises(kernels.KernelError):
        kernels.linear(mask_of_two(), x, out)


def test_rows_that_are_not_there():
    for first, last in ((-1, 1), (1, 3), (2, 1)):
        with pytest.raises(kernels.KernelError):
            kernels.unpack(mask_of_two(), first, last, torch.empty(max(0, last - first), 64))


def test_unknown_variants_name_the_known():
    with pytest.raises(kernels.KernelError, match="portable"):
        kernels.use("mmx")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SECATEUR_KERNELS": "mmx"}
    ended = subprocess.run(
        [sys.executable, "-c", "import secateur_kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "mmx" in ended.stderr
