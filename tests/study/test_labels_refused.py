"""Studies of labelled texts that are refused: by their file alone, and once model and texts are open."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import CalibrationError, SecateurError, StudyError, UnknownNameError, UnsupportedModelError
from secateur.progress import Recorder
from secateur.study.read import load_studies, load_study, read_studies, read_study
from secateur.study.setup import set_up
from tests.models import save_tiny
from tests.study.labelled import plain, rows, write_model_and_splits, write_rows, write_study
from tests.study.studies import plain as plain_text

ACCURATE = {"accuracy": "maximize"}
DATA = {"source": ".", "calibration": "train", "choice": "dev", "test": "test", "samples": 4, "sequence-length": 32}
BAD = {
    "unknown task": ({"task": "label"}, UnknownNameError, "did you mean 'labels'"),
    "perplexity of a classifier": ({"objectives": {"perplexity": "minimize"}}, StudyError, "leave task: labels out"),
    "accuracy that nothing has": ({"constraints": ["accuracy >= 1.5"]}, StudyError, "at most 1"),
    "contradiction": (
        {"constraints": ["accuracy >= dense - 0.01", "accuracy <= dense - 0.05"]}, StudyError, "meet both",
    ),
    "windows": ({"data": {**DATA, "windows": 4}}, StudyError, "windows has no meaning"),
    "no test data": ({"data": {"calibration": "train", "choice": "dev"}}, StudyError, "test is missing"),
    "baseline of llama.cpp": ({"baselines": ["q8_0"]}, StudyError, "take bfloat16 and torchao-8"),
    "stop without quality": ({"objectives": {"nonzero": "minimize"}, "stop": {}}, StudyError, "needs accuracy"),
    "stop by a limit from above": (
        {"objectives": {"nonzero": "minimize"}, "constraints": ["accuracy <= 0.5"], "stop": {}}, StudyError, "stop",
    ),
    "recovery of text": ({"space": {"sparsity": 0.5, "recovery": {"loss": "lm"}}}, StudyError, "labels or kd"),
    "recovery by blocks": ({"space": {"sparsity": 0.5, "recovery": {"mode": "blocks"}}}, StudyError, "no labels"),
    "fine-tuning with data": ({"fine-tune": {"data": "x"}}, StudyError, "calibration data"),
    "fine-tuning by an unknown setting": ({"fine-tune": {"epoch": 1}}, UnknownNameError, "did you mean 'epochs'"),
    "several models in one storage": ({"model": ["a", "b"], "storage": "s.db"}, StudyError, "several models"),
    "a model twice": ({"model": ["x/a", "y/a"]}, StudyError, "names differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_studies_are_refused_by_their_file(case):
    changes, kind, words = BAD[case]
    with pytest.raises(kind) as raised:
        read_studies(plain(**changes), Path(), "s.yaml")
    assert words in raised.value.message + raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": ACCURATE}, "accuracy is not measured"),
        ({"fine-tune": {"epochs": 1}}, "task: labels"),
        ({"data": {"source": "x"}}, "source has no meaning"),
    ],
)
def test_a_study_of_text_takes_nothing_of_labels(changes, words):
    with pytest.raises(StudyError) as raised:
        read_study(plain_text(**changes), Path(), "s.yaml")
    assert words in raised.value.message + raised.value.hint


def test_several_models_are_studies_of_their_own(tmp_path):
    path = write_study(tmp_path, model=["demo", "demo-encoder"], name="both")
    one, other = load_studies(path, source="some/dataset")
    assert (one.name, one.model, one.storage) == ("both-demo", "demo", tmp_path / "both-demo.db")
    assert (other.name, other.out) == ("both-demo-encoder", tmp_path / "both-demo-encoder")
    assert one.data.source == other.data.source == "some/dataset"
    with pytest.raises(StudyError, match="names 2 models"):
        load_study(path)


def test_the_classifier_study_is_read_and_every_setting_can_be_run():
    for spec in load_studies("classifier"):
        grid = list(spec.grid())
        assert (spec.task, spec.minutes) == ("labels", 30)
        structures = {one["structure"] for one in grid}
        assert structures >= {"none", "depth", "ffn", "heads"}
        assert {one["dtype"] for one in grid} == {"auto", "bfloat16"}
        assert {one.get("format", "hf") for one in grid} == {"hf", "sparse-8", "torchao-8"}
        assert {one["recovery"] == "none" for one in grid} == {True, False}
        assert [one.text for one in spec.constraints] == ["accuracy >= dense - 0.01"]


def test_data_for_a_study_without_labels_is_refused():
    with pytest.raises(StudyError, match="no labelled texts"):
        load_study("paper", source="folder")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_model_and_splits(tmp_path_factory.mktemp("refused"))
    save_tiny(folder / "t5", "t5")
    write_rows(folder / "three.jsonl", [*rows(9, 4), {"text": "a third kind", "label": 2}])
    write_rows(folder / "minus.jsonl", [{"text": "below", "label": -1}])
    write_rows(folder / "nolabel.jsonl", [{"text": "no label", "class": 1}])
    write_rows(folder / "one.jsonl", [{"text": f"all the same {row['text']}", "label": 0} for row in rows(8, 30)])
    (folder / "copy.jsonl").write_text((folder / "tiny-test.jsonl").read_text().upper().replace("TEXT", "text")
                                       .replace("LABEL", "label"))  # fmt: skip
    return folder


OPENED = {
    "label outside the range": ({"data": {**DATA, "choice": "three"}}, CalibrationError, "line 5: label is 2"),
    "negative label": ({"data": {**DATA, "choice": "minus"}}, CalibrationError, "line 1: label is -1"),
    "missing column": ({"data": {**DATA, "test": "nolabel"}}, CalibrationError, "no column 'label'"),
    "one class": ({"data": {**DATA, "calibration": "one"}, "space": {"sparsity": 0.5}}, SecateurError, "label"),
    "rows that are not there": ({"data": {**DATA, "choice": "dev[100:200]"}}, CalibrationError, "24 rows"),
    "split that is not there": ({"data": {**DATA, "choice": "validate"}}, CalibrationError, "no split 'validate'"),
    "seen text, in capitals": ({"data": {**DATA, "calibration": "copy"}}, StudyError, "overlap: 100%"),
    "rows of both": ({"data": {**DATA, "calibration": "train[:40]", "choice": "train[30:60]"}}, StudyError, "overlap"),
    "stop after more than there is": (
        {"objectives": ACCURATE, "stop": {"evaluate": 25}}, StudyError, "choice has 24 in all",
    ),
    "no classifier, and not made one": ({"fine-tune": None}, UnsupportedModelError, "is no text classifier"),
    "encoder-decoder": ({"model": "t5"}, UnsupportedModelError, "can be fine-tuned"),
    "limit that no shape gives": ({"constraints": ["bytes_disk <= 1KB"]}, StudyError, "no trial can meet"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPENED)
def test_what_could_not_be_measured_is_refused_before_any_work(case, root):
    changes, kind, words = OPENED[case]
    with pytest.raises(kind) as raised:
        set_up(read_study(plain(**changes), root, "tiny.yaml"), Recorder())
    assert words in raised.value.message + raised.value.hint
    assert raised.value.exit_code == 2
    assert not (root / "tiny.db").exists()
    assert not (root / "tiny").exists()


def test_halves_of_one_split_are_choice_and_test(root):
    setup = set_up(read_study(plain(data={**DATA, "choice": "dev", "test": "dev"}), root, "tiny.yaml"), Recorder())
    halves = [setup.texts.labelled[name].texts for name in ("choice", "test")]
    assert halves[0] + halves[1] == [row["text"] for row in rows(2, 24)]
    assert len(halves[0]) == 12
