"""``secateur report``: flags become the arguments of the verb; the page to its file, Markdown and JSON to stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from secateur.allocation_file import AllocationFile, write_allocation
from tests.pages.made import pruning, study, write
from tests.study.studies import write_study


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "pruned", pruning())


def test_flags_become_arguments(verb, run, tmp_path, monkeypatch):
    from secateur.report_result import ReportResult

    stand_in = verb("report")
    sys.modules["secateur.verbs.report"].render = lambda result, format: "text"
    stand_in.answer = ReportResult(["a", "b", "c"], None, "", [])
    done = run("report", "a", "b.json", "--format", "md", "--prompt", "x", "--prompt", "y", "--text", "t.txt",
               "--no-run", "--samples", "2", "--sequence-length", "64", "--overwrite")  # fmt: skip
    assert (done.status, done.out) == (0, "text\n")
    assert stand_in.args == (["a", "b.json"], None)
    assert stand_in.kwargs.pop("reporter") is not None
    assert stand_in.kwargs == {
        "format": "md", "prompts": ("x", "y"), "text": "t.txt", "run": False, "samples": 2, "sequence_length": 64,
        "device": "auto", "overwrite": True,
    }  # fmt: skip


def test_a_page_is_written_and_the_answer_said(run, folder, tmp_path):
    done = run("report", str(folder), "-o", str(tmp_path / "page.html"), "--no-run")
    assert done.status == 0, done.err
    assert "does not pay" in done.out
    assert str(tmp_path / "page.html") in done.out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_an_allocation_file_makes_a_page_by_itself(run, tmp_path):
    names = ("h.0.a.weight", "h.1.a.weight")
    shapes = {name: [4, 4] for name in names}
    made = AllocationFile(
        dict(zip(names, (0.25, 0.75), strict=True)), shapes, 0.5, {"model": "demo", "allocation": "owl"}
    )
    write_allocation(tmp_path / "alloc.yaml", made)
    done = run("report", str(tmp_path / "alloc.yaml"), "-o", str(tmp_path / "page.html"))
    assert done.status == 0, done.err
    assert "alloc.yaml divides 50.00% zeros among 2 matrices of demo by owl" in done.out
    assert f"secateur prune demo --allocation {tmp_path / 'alloc.yaml'}" in done.out
    assert "(allocations: 1;" in done.out
    (tmp_path / "broken.yaml").write_text("matrices: 1")
    refused = run("report", str(tmp_path / "broken.yaml"), "-o", str(tmp_path / "other.html"))
    assert (refused.status, refused.out) == (2, "")
    assert "has no matrices" in refused.err
    assert not (tmp_path / "other.html").exists()


def test_json_is_one_object_with_and_without_a_file(run, folder, tmp_path):
    first = run("report", str(folder), "--no-run", "--json")
    second = run("report", str(folder), "--no-run", "--format", "json")
    third = run("report", str(folder), "--no-run", "--json", "-o", str(tmp_path / "page.html"))
    fourth = run("report", str(folder), "--no-run", "-o", str(tmp_path / "page.json"))
    assert json.loads(first.out) == json.loads(second.out) == json.loads(third.out)
    assert json.loads((tmp_path / "page.json").read_text()) == json.loads(first.out)
    assert fourth.status == 0


def test_a_study_is_named_by_its_file_or_its_storage(verb, run, tmp_path, monkeypatch):
    stand_in = verb("report")
    sys.modules["secateur.verbs.report"].render = lambda result, format: "text"
    monkeypatch.chdir(tmp_path)
    looked = []
    monkeypatch.setattr("secateur.study.status.study_status", looked.append)
    (tmp_path / "paper").mkdir()  # where the study of that name puts its models
    write(tmp_path / "classifier", pruning())  # a result that is called like a study
    file = write_study(tmp_path, storage="kept.db")
    done = run("report", str(file), "x.db", "paper", "classifier", "--format", "md")
    assert done.status == 0, done.err
    storages = [tmp_path / "kept.db", Path("x.db"), tmp_path / "paper.db"]
    assert [path.resolve() for path in looked] == [path.resolve() for path in storages]
    results = [Path(path).resolve() for path in stand_in.args[0]]
    assert results == [*(path.resolve().with_suffix(".json") for path in storages), tmp_path.resolve() / "classifier"]


def test_a_study_that_was_not_run_is_said_to_be_so(run, tmp_path):
    done = run("report", str(write_study(tmp_path)), "-o", str(tmp_path / "page.html"))
    assert done.status == 2
    assert "secateur study run" in done.err
    assert not (tmp_path / "page.html").exists()


def test_markdown_goes_to_stdout(run, tmp_path):
    done = run("report", str(write(tmp_path / "s.json", study())), "--format", "md")
    assert done.status == 0
    assert done.out.startswith("# Report: demo\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a page needs a file"),
        (["--format", "pdf"], "unknown format 'pdf'"),
        (["--format", "md", "--json"], "both write to stdout"),
        (["-o", "page.txt", "--format", "html"], "does not end in .html"),
    ],
)
def test_bad_usage_is_two_and_writes_nothing(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run("report", str(folder), "--no-run", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert not list(Path().glob("page*"))


def test_a_file_that_is_no_result_is_refused_with_what_was_expected(run, tmp_path):
    (tmp_path / "x.json").write_text('{"schema_version": 99}')
    done = run("report", str(tmp_path / "x.json"), "--format", "md")
    assert done.status == 2
    assert "schema version 99" in done.err
    assert "newer secateur" in done.err
