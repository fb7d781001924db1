"""Each conversion where other models can be: in `bench`, in `report`, written again and opened in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.bench_result import BenchResult
from secateur.measure.model import load_model
from tests.converting.models import logits, tuned
from tests.models import calibration_for, save_tiny

SIZES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
"""Matrices (out, in) of each of the two blocks."""
NETWORK = 3 * 32 * 48
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20
# What comes to the products of a token, or goes: two factors for a matrix, half of both networks and a router, one of
# two differences and both routers, nothing, and two of four adapters with their router.
MORE = {
    "factors": 2 * sum(8 * (out + inner) - out * inner for out, inner in SIZES),
    "experts": 2 * (8 * 32 + 8 * 8 - NETWORK // 2),
    "fused": 2 * sum(4 * (out + inner) + 2 * 2 * inner for out, inner in SIZES),
    "tied": 0,
    "adapters": 2 * (2 * 2 * 3 * 32 + 4 * 32),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense model, and one folder for each way to convert it."""
    root = tmp_path_factory.mktemp("everywhere")
    dense = save_tiny(root / "dense", "llama")
    models = [str(tuned(root / name, "llama", seed)) for seed, name in enumerate(("one", "two"), 1)]
    (root / "text.txt").write_text(TEXT)
    quick = {"evaluate": False, "verify": False}
    text = {**quick, "calibration": calibration_for("llama")}
    secateur.convert(dense, root / "factors", to="factorized", rank=8, **text)
    secateur.convert(dense, root / "chains", to="factorized", cores=3, rank=4, **text)
    secateur.convert(dense, root / "experts", to="moe", experts=8, top_k=4, **text)
    secateur.convert(dense, root / "fused", to="fused", models=models, rank=4, router_rank=2, **quick)
    secateur.convert(dense, root / "tied", to="shared", groups=1, **quick)
    secateur.convert(root / "tied", root / "fewer", to="shared", iterations=1, **quick)
    secateur.recover(
        dense, root / "adapters", dense=True, mode="adapter-moe", experts=4, top_k=2, dim=3, loss="lm", tokens=64,
        sequence_length=32, data=str(root / "text.txt"), **quick,
    )  # fmt: skip
    names = ("dense", "factors", "chains", "experts", "fused", "tied", "fewer", "adapters")
    return {name: root / name for name in names}


@pytest.fixture(scope="module")
def bench(made: dict[str, Path]) -> BenchResult:
    others = [folder for name, folder in made.items() if name != "dense"]
    return secateur.bench(
        made["dense"], against=others, prompt_tokens=16, new_tokens=4, rounds=1, sequence_length=64, threads=1,
    )  # fmt: skip


def test_a_bench_has_all_of_them_with_what_is_in_them(made, bench):
    rows = {Path(row.name).name: row for row in bench.against}
    assert rows.keys() == made.keys() - {"dense"}
    for name, row in rows.items():
        assert row.parameters == load_model(made[name]).num_parameters()
        assert row.perplexity > 1
        assert row.decode_tokens_per_second > 0
        assert row.flops_per_token is not None, row.missing
    for name, products in MORE.items():
        assert rows[name].flops_per_token == bench.flops_per_token + 2 * products, name


def test_a_report_has_all_of_them(made, tmp_path):
    folders = [folder for name, folder in made.items() if name != "dense"]
    found = secateur.report(folders, tmp_path / "page.html")
    own = {model.name.rpartition("/")[2]: model for model in found.models if model.kind != "dense"}
    assert own.keys() >= made.keys() - {"dense", "adapters"}
    assert {own[name].kind for name in made if name in own and name != "adapters"} == {"converted"}
    assert own["adapters"].values["parameters"] == load_model(made["adapters"]).num_parameters()


def test_what_was_written_again_opens_in_a_fresh_process_as_the_same(made, tmp_path):
    again = {name: tmp_path / name for name in made if name != "dense"}
    for name, folder in again.items():
        load_model(made[name]).save_pretrained(folder)
    torch.save(calibration_for("llama")[:3], tmp_path / "ids.pt")
    code = f"""
import torch, transformers
import secateur
from safetensors.torch import save_file
ids = torch.load({str(tmp_path / "ids.pt")!r})
torch.set_num_threads(1)
found = {{}}
for name in {list(again)!r}:
    model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name).eval()
    with torch.no_grad():
        found[name] = model(ids).logits
save_file(found, {str(tmp_path / "found.safetensors")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    for name, answer in load_file(tmp_path / "found.safetensors").items():
        torch.testing.assert_close(answer, logits(made[name]), atol=1e-5, rtol=1e-5)
