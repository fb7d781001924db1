"""The bridge to lm-eval: what it hands over and what it makes of the results."""

from __future__ import annotations

import sys
import types

import pytest

from secateur.errors import CalibrationError, MissingExtraError, UnknownNameError, UnsupportedModelError
from secateur.measure.lm_eval import run_tasks
from tests.models import tiny_model, tiny_tokenizer

MODEL = tiny_model("llama")


@pytest.fixture
def suite(monkeypatch):
    """A stand-in for the package with three tasks; records how it was called."""
    calls = {}
    package = types.ModuleType("lm_eval")
    package.__version__ = "9.9"

    def simple_evaluate(**arguments):
        calls.update(arguments)
        return {
            "results": {
                "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6,
                         "acc_norm_stderr,none": 0.2},
                "mean": {"alias": "mean", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
                "nothing": {"alias": "nothing"},
            },
            "n-shot": {"piqa": 2},
        }  # fmt: skip

    package.simple_evaluate = simple_evaluate
    models, huggingface, tasks = (types.ModuleType(f"lm_eval.{n}") for n in ("models", "models.huggingface", "tasks"))
    huggingface.HFLM = lambda **arguments: ("wrapped", arguments)
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["piqa", "mean", "nothing"])
    for module in (package, models, huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_main_metrics_with_their_errors(suite):
    tokenizer = tiny_tokenizer()
    piqa, mean = run_tasks(MODEL, tokenizer, ["piqa", "mean"], limit=5)
    assert (piqa.metric, piqa.value, piqa.stderr) == ("acc_norm", 0.6, 0.2)
    assert "2-shot" in piqa.protocol
    assert "9.9" in piqa.protocol
    assert (mean.metric, mean.value, mean.stderr) == ("word_perplexity", 12.5, None)
    kind, arguments = suite["model"]
    assert kind == "wrapped"
    assert arguments["pretrained"] is MODEL
    assert arguments["tokenizer"] is tokenizer
    assert suite["tasks"] == ["piqa", "mean"]
    assert suite["limit"] == 5


def test_an_unknown_task_is_named_with_the_nearest(suite):
    with pytest.raises(UnknownNameError) as caught:
        run_tasks(MODEL, tiny_tokenizer(), ["piqaa"])
    assert caught.value.nearest == "piqa"


def test_a_task_without_numbers(suite):
    with pytest.raises(CalibrationError, match="no number"):
        run_tasks(MODEL, tiny_tokenizer(), ["nothing"])


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError) as caught:
        run_tasks(MODEL, tiny_tokenizer(), ["piqa"])
    assert "secateur[lm-eval]" in caught.value.hint


def test_encoders_are_refused(suite):
    with pytest.raises(UnsupportedModelError):
        run_tasks(tiny_model("bert"), tiny_tokenizer(), ["piqa"])
