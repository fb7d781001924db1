"""The report of real (tiny) models: pruned, run beside their dense ones, written whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

import secateur
from secateur.errors import CalibrationError, OutputError, UnknownNameError, UsageError
from secateur.measure.perplexity import perplexity
from secateur.progress import Recorder
from secateur.study_result import Trial
from secateur.verbs.report import render, report
from tests.models import save_tiny, tiny_model, tiny_tokenizer
from tests.pages.made import pruning, study, write
from tests.pages.reading import Page

TEXT = " ".join(f"The {i}th word of this text is number {i * 7 % 13}, and then Some More." for i in range(40))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, two pruned from it, and a text."""
    where = tmp_path_factory.mktemp("models")
    save_tiny(where / "dense", "llama")
    (where / "text.txt").write_text(TEXT)
    for name, settings in (
        ("half", {"method": "magnitude", "sparsity": 0.5}),
        ("same", {"method": "magnitude", "sparsity": 0.0}),
    ):
        secateur.prune(
            where / "dense", where / name, evaluate=False, verify=False, samples=2, sequence_length=32, **settings
        )
    return where


@pytest.fixture(scope="module")
def made(place):
    return report(
        [place / "half", place / "same"], place / "page.html", text=place / "text.txt", sequence_length=64, samples=3,
        prompts=["The 3th word", "Some"],
    )  # fmt: skip


def test_the_page_is_written_with_everything_that_was_run(made, place):
    page = Page((place / "page.html").read_text(encoding="utf-8"))
    assert page.data["result"] == json.loads(made.to_json())
    for key in ("frequency-0", "position-0", "spread-0-angle", "damage-1", "map-0"):
        assert key in page.ids("figure")
    assert "sensitivity" not in page.ids("figure")  # magnitude knows no loss
    assert "map-1" not in page.ids("figure")
    assert "same has no zeros to draw" in page.text()
    assert not list(place.glob("*.partial"))


def test_losses_are_those_of_the_perplexity(made, place):
    half = made.examined[0]
    tokens = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(tokens[: 3 * 64]).view(3, 64)
    expected = perplexity(tiny_model("llama"), windows).nll_per_token
    for groups in (half.by_frequency, half.by_position):
        total = sum(group.tokens for group in groups)
        assert total == 3 * 63
        assert sum(g.tokens * g.dense for g in groups) / total == pytest.approx(expected, abs=1e-5)
    assert half.conditions[0].dense_loss == pytest.approx(expected, abs=1e-5)
    assert {c.name for c in half.conditions} == {"clean", "typos", "case", "dropped"}


def test_a_model_that_lost_nothing_is_exactly_the_dense_one(made):
    half, same = made.examined
    assert all(group.difference == 0 for group in (*same.by_frequency, *same.by_position))
    assert all(d.change == [0.0] * 5 for d in same.distributions)
    assert same.broken == []
    assert all(each.dense == each.pruned for each in same.continued)
    assert any(any(d.change) for d in half.distributions)
    assert [each.prompt for each in half.continued] == ["The 3th word", "Some"]


def test_parts_of_the_difference_add_up(made):
    for row in made.examined[0].conditions:
        assert row.length_part + row.direction_part == pytest.approx(row.pruned_loss - row.dense_loss, abs=1e-5)


def test_without_running_the_page_has_what_files_say(place, tmp_path):
    result = report([place / "half"], tmp_path / "page.md", format="md", run=False)
    assert result.examined == []
    assert result.maps[0].sparsity
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render(result, "md")


def test_the_finalists_that_a_study_kept_are_run(place, tmp_path):
    """Not those whose folder is gone, nor one that is an input of its own, nor a classifier."""

    def tried(number, folder, **values):
        settings = {"method": "sparsegpt", "sparsity": number / 10, "structure": "none"}
        return Trial(number, "complete", settings, "make it", {"perplexity": 10.0, "bytes_disk": 10, **values},
                     sparsity={"w": 0.5}, out=str(folder))  # fmt: skip

    secateur.prune(place / "dense", tmp_path / "solved", method="sparsegpt", sparsity=0.5, evaluate=False,
                   verify=False, samples=2, sequence_length=32)  # fmt: skip
    trials = [tried(5, tmp_path / "solved"), tried(6, place / "half"), tried(7, tmp_path / "gone")]
    found = study(trials=trials, finalists=trials, recommended=5)
    file = write(tmp_path / "study.json", found)
    settings = {"text": place / "text.txt", "sequence_length": 32, "samples": 2}
    result = report([file, place / "half"], tmp_path / "page.html", **settings)
    assert [each.model for each in result.examined] == ["half", "5: sparsegpt 0.5"]
    assert all(each.continued and each.broken for each in result.examined)
    assert {"sensitivity", "frequency-0", "damage-1"} <= set(Page((tmp_path / "page.html").read_text()).ids("figure"))
    assert report([file], run=False).examined == []
    found.finalists = []  # it still runs: what it would recommend now is looked at
    assert [each.model for each in report([write(file, found)], **settings).examined] == ["5: sparsegpt 0.5"]
    found.baselines = [Trial(-1, "complete", {}, "", {"accuracy": 0.9, "bytes_disk": 10}, name="dense")]
    assert report([write(file, found)], **settings).examined == []


def test_a_dense_model_that_is_gone_or_changed_is_told(place, tmp_path):
    gone = write(tmp_path / "gone", pruning(source={"name": "x", "model": str(tmp_path / "nowhere"), "sha256": "1"}))
    recorder = Recorder()
    result = report([place / "half", gone], text=place / "text.txt", sequence_length=16, samples=1, reporter=recorder)
    assert [bool(each.skipped) for each in result.examined] == [False, True]
    assert any("gone was not run: no such file or folder" in text for text in result.warnings)
    changed = json.loads((place / "half" / "secateur.json").read_text())
    changed["source"]["sha256"] = "0" * 64
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "secateur.json").write_text(json.dumps(changed))
    result = report([tmp_path / "changed"], text=place / "text.txt")
    assert "not any more what was pruned" in result.examined[0].skipped


def test_a_model_without_a_language_head_says_why(tmp_path):
    save_tiny(tmp_path / "dense", "bert")
    secateur.prune(tmp_path / "dense", tmp_path / "out", method="magnitude", evaluate=False, verify=False)
    result = report([tmp_path / "out"], tmp_path / "page.html")
    assert "encoder" in result.examined[0].skipped
    assert "encoder" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text()


def test_bad_arguments_are_refused_and_nothing_is_written(place, tmp_path):
    out = tmp_path / "page.html"
    good = place / "half"
    (tmp_path / "page.md").write_text("mine")
    (tmp_path / "empty.txt").write_text(" ")
    short = tmp_path / "short.txt"
    short.write_text("x")
    for error, inputs, where, settings in (
        (UnknownNameError, [good], out, {"format": "pdf"}),
        (UsageError, [good], out, {"sequence_length": 1}),
        (UsageError, [good], out, {"samples": 0}),
        (UsageError, [good], out, {"prompts": [" "]}),
        (UsageError, [], out, {}),
        (UsageError, str(good), out, {}),
        (OutputError, [good], tmp_path / "page.txt", {}),
        (OutputError, [good], tmp_path / "page.md", {"format": "md"}),
        (OutputError, [good], good / "page.html", {}),
        (CalibrationError, [good], out, {"text": tmp_path / "empty.txt"}),
        (CalibrationError, [good], out, {"text": tmp_path / "absent.txt"}),
    ):
        with pytest.raises(error) as told:
            report(inputs, where, **settings)
        assert told.value.hint
        assert not out.exists()
    assert (tmp_path / "page.md").read_text() == "mine"
    assert report([good], text=short).examined[0].skipped  # nothing to predict, but the rest of the report is there


def test_an_existing_file_is_replaced_when_asked(place, tmp_path):
    file = write(tmp_path / "study.json", study())
    report([file], tmp_path / "page.json", format="json")
    result = report([file], tmp_path / "page.json", format="json", overwrite=True)
    assert json.loads((tmp_path / "page.json").read_text()) == result.to_dict()
