"""What is refused once model and texts are open, and still before the first trial."""

from __future__ import annotations

import pytest

from secateur.engine.skeleton import build_skeleton
from secateur.errors import CalibrationError, SecateurError, StudyError, UnsupportedModelError, UsageError
from secateur.measure.flops import count_flops
from secateur.progress import Recorder
from secateur.study.flops import measure_flops
from secateur.study.read import load_study
from secateur.study.setup import set_up
from tests.models import save_tiny
from tests.study.studies import write_study


def opened(place, **changes):
    return set_up(load_study(write_study(place, **changes)), Recorder())


def test_windows_are_cut_once_and_are_those_of_the_texts(place):
    setup = opened(place)
    assert setup.cut["choice"].shape == setup.cut["test"].shape == (6, 32)
    text = (place / "choice.txt").read_text()
    assert "".join(map(chr, setup.cut["choice"].flatten().tolist())) == text[: 6 * 32]  # one token a letter


def test_a_method_without_data_is_asked_for_without_text(place):
    setup = opened(place, space={"method": ["wanda", "magnitude"], "structure": ["none", "depth"], "sparsity": 0.5})
    found = {one.get("method", one["structure"]): setup.recipe(one) for one in setup.spec.grid()}
    assert {name: reads for name, (_, reads) in found.items()} == {"wanda": True, "magnitude": False, "depth": True}
    assert found["magnitude"][0].samples is None
    assert found["wanda"][0].samples == 8


@pytest.mark.parametrize("more", [{"refit": True}, {"reconstruct": "block"}, {"allocation": "owl"}])
def test_a_method_without_data_reads_text_for_what_comes_with_it(place, more):
    setup = opened(place, space={"method": "magnitude", "sparsity": 0.5, **more})
    recipe, reads = setup.recipe(next(iter(setup.spec.grid())))
    assert reads
    assert recipe.samples == setup.spec.data.samples


BAD = {
    "too few windows to calibrate": ({"data": {"samples": 10_000}}, CalibrationError, "calibration"),
    "longer than the model": ({"data": {"sequence-length": 4096}}, UsageError, "256"),
    "option that the method refuses": (
        {"space": {"method": "sparsegpt", "sparsity": 0.5, "method-options": {"sparsegpt": {"damping": [0.01, -1]}}}},
        SecateurError, "damping",
    ),
    "bytes that no setting gives": ({"constraints": ["bytes_disk <= 0.1KB"]}, StudyError, "no trial can meet"),
    "fewer parameters without structures": ({"constraints": ["parameters <= 100"]}, StudyError, "no trial can meet"),
    "missing text": ({"data": {"choice": "missing.txt"}}, CalibrationError, "missing.txt"),
    "missing model": ({"model": "./missing"}, SecateurError, "missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_could_not_be_measured_is_refused(case, place):
    changes, kind, words = BAD[case]
    data = {"calibration": "calibration.txt", "choice": "choice.txt", "test": "test.txt", "samples": 8,
            "sequence-length": 32, "windows": 6, **changes.pop("data", {})}  # fmt: skip
    with pytest.raises(kind) as raised:
        opened(place, data=data, **changes)
    assert words in raised.value.message
    assert raised.value.exit_code == 2
    assert not (place / "tiny.db").exists()
    assert not (place / "tiny").exists()


def test_a_limit_on_bytes_that_only_a_stored_format_meets_is_no_contradiction(place):
    """Half of the dense file: zeros do not make an ordinary folder smaller, and the sparse format does."""
    limit = (place / "model" / "model.safetensors").stat().st_size // 2
    space = {"method": "magnitude", "sparsity": 0.5}
    constraints = [f"bytes_disk <= {limit}B"]
    with pytest.raises(StudyError, match="no trial can meet"):
        opened(place, space=space, constraints=constraints)
    assert opened(place, space={**space, "format": ["hf", "sparse-4"]}, constraints=constraints)
    with pytest.raises(StudyError, match="no trial can meet"):
        opened(place, space={**space, "format": "sparse-4"}, constraints=["bytes_disk <= 0.1KB"])


def test_operations_are_those_of_the_counter(place):
    values, missing = measure_flops(place / "model", {})
    expected = count_flops(build_skeleton(place / "model"))
    assert values == {"flops_per_token": expected.per_token, "sparse_flops_per_token": expected.per_token}
    assert missing == {}


def test_operations_that_cannot_be_counted_have_a_reason(tmp_path):
    values, missing = measure_flops(save_tiny(tmp_path / "t5", "t5"), {})
    assert set(values.values()) == {None}
    assert "not defined" in missing["flops_per_token"]


def test_an_encoder_has_no_perplexity_to_compare(place, tmp_path):
    save_tiny(place / "encoder", "bert")
    with pytest.raises((UnsupportedModelError, StudyError)):
        opened(place, model="encoder")


def test_energy_that_nothing_here_measures_is_refused(place, monkeypatch):
    monkeypatch.setattr("secateur.study.setup.find_meter", lambda device: (None, "no meter in this test"))
    for asked in (
        {"objectives": {"joules_per_token": "minimize"}},
        {"constraints": ["joules_per_token <= 0.5x"]},
    ):
        with pytest.raises(StudyError, match="joules_per_token cannot be measured here: no meter in this test"):
            opened(place, **asked)
    assert opened(place, objectives={"bytes_resident": "minimize"}).trial_load is not None
