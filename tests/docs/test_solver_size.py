"""The benchmark of solvers by size: every method is measured, finished rows stay, and the plot shows the numbers."""

from __future__ import annotations

import itertools
import json
import sys
import xml.etree.ElementTree as ET

import pytest

from secateur.plugins import available
from tests.docs.fences import ROOT
from tests.docs.test_documents import load_module

SIZES = [(256, 256), (512, 512), (1024, 1024), (4096, 11008)]


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return load_module(ROOT / "docs" / "generate.py", "generate_docs")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = load_module(ROOT / "benchmarks" / "solver_size.py", "bench_solver_size")
    monkeypatch.setattr(module._common, "RESULTS", tmp_path / "results")
    return module


def rows(methods=("wanda", "alps")):
    """Seconds that are a power of the number of weights, another one for each method."""
    return [
        {"method": name, "outputs": r, "inputs": c, "seconds": 1e-9 * (r * c) ** (1 + number / 2), "runs": 5,
         "peak MB": 300.0, "of what is given": 3.0}
        for r, c in SIZES for number, name in enumerate(methods)
    ]  # fmt: skip


def stored(root, found):
    place = root / "benchmarks" / "results"
    place.mkdir(parents=True, exist_ok=True)
    machine = {"processor": "p", "cores": 2, "threads": 1, "python": "3", "torch": "2", "transformers": "5"}
    data = {"protocol": "told", "command": "c", "commit": "x", "machine": machine, "rows": found}
    (place / "solver_size.json").write_text(json.dumps(data))


def test_without_a_measurement_there_is_neither_table_nor_plot(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert "Not measured yet: `benchmarks/results/solver_size.json`" in generator.solver_sizes()
    assert generator.DRAWINGS["docs/solver-size.svg"]() is None


def test_the_table_has_every_row_and_the_machine(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    stored(tmp_path, rows()[:-1])  # the last one is still to come
    text = generator.solver_sizes()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = lines[0]
    assert head == ["| seconds", "256×256", "512×512", "1024×1024", "4096×11008 |"]
    wanda = next(line for line in lines if line[0] == "| wanda")
    assert [float(value.rstrip(" |")) for value in wanda[1:]] == pytest.approx(
        [1e-9 * r * c for r, c in SIZES], rel=1e-3
    )
    assert next(line for line in lines if line[0] == "| alps")[-1].strip(" |") == ""
    assert "One thread of 2." in text
    assert f"]({generator.SOLVER_PLOT})" in text


def test_powers_are_straight_lines_with_their_slope(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    stored(tmp_path, rows())
    tree = ET.fromstring(generator.DRAWINGS["docs/solver-size.svg"]())
    space = "{http://www.w3.org/2000/svg}"
    slopes = []
    for path in (each for each in tree.iter(f"{space}path") if each.get("class") == "line"):
        places = [tuple(map(float, pair.split())) for pair in path.get("d").removeprefix("M").split("L")]
        assert len(places) == len(SIZES)
        steps = [(y - b) / (x - a) for (a, b), (x, y) in itertools.pairwise(places)]
        assert steps == pytest.approx([steps[0]] * len(steps), rel=0.02)
        slopes.append(steps[0])
    assert slopes[1] / slopes[0] == pytest.approx(1.5, rel=0.02)
    names = {text.text: float(text.get("y")) for text in tree.iter(f"{space}text") if text.get("class") == "name"}
    assert set(names) == {"wanda", "alps"}
    assert names["alps"] < names["wanda"]  # slower is higher


def test_names_are_apart_and_mean_nothing_in_svg(generator):
    names = ["</text><script>", 'a" onload="x', "b&", "c"]
    drawing = load_module(ROOT / "docs" / "log_log.py", "log_log_alone")
    tree = ET.fromstring(drawing.log_log({name: [(1.0, 2.0), (10.0, 3.0)] for name in names}, "x", "y", "<label>"))
    found = [text for text in tree.iter() if text.get("class") == "name"]
    assert sorted(text.text for text in found) == sorted(names)
    heights = sorted(float(text.get("y")) for text in found)
    assert all(second - first >= 12 for first, second in itertools.pairwise(heights))
    assert "script" not in {each.tag.rpartition("}")[2] for each in tree.iter()}


def test_a_drawing_that_is_out_of_date_is_noticed_and_one_without_numbers_goes(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "PARTS", {})
    (tmp_path / "docs").mkdir()
    drawing = tmp_path / "docs" / generator.SOLVER_PLOT
    assert generator.main(["--check"]) == 0
    stored(tmp_path, rows())
    assert generator.main(["--check"]) == 1
    assert not drawing.exists()
    assert generator.main([]) == 0
    assert drawing.is_file()
    assert generator.main(["--check"]) == 0
    stored(tmp_path, rows()[:4])
    assert generator.main(["--check"]) == 1
    (tmp_path / "benchmarks" / "results" / "solver_size.json").unlink()
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert not drawing.exists()


def test_every_method_is_measured(bench):
    for method in [*available("methods"), bench.REFIT]:
        found = bench.measure(method, 24, 32)
        assert found["seconds"] > 0
        assert found["runs"] == bench.RUNS
        assert found["peak MB"] > 10


def test_finished_rows_are_kept_and_the_rest_is_run(bench, monkeypatch, capsys):
    asked = []

    def stand_in(method, outputs, inputs, threads):
        asked.append((method, outputs, inputs, threads))
        return {"method": method, "outputs": outputs, "inputs": inputs, "seconds": 1.0, "runs": 1}

    monkeypatch.setattr(bench, "row_of", stand_in)
    monkeypatch.setattr(sys, "argv", ["solver_size.py", "--sizes", "8x16,4x4", "--methods", "wanda,alps"])
    bench.main()
    assert asked == [("wanda", 8, 16, 1), ("alps", 8, 16, 1), ("wanda", 4, 4, 1), ("alps", 4, 4, 1)]
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["solver_size.py", "--sizes", "4x4,8x16", "--methods", "refit,wanda,alps"])
    bench.main()
    assert asked == [("refit", 4, 4, 1), ("refit", 8, 16, 1)]
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["method"], row["outputs"]) for row in data["rows"]] == [
        ("alps", 4), ("wanda", 4), ("refit", 4), ("alps", 8), ("wanda", 8), ("refit", 8),
    ]  # fmt: skip
    assert data["machine"]["threads"] == 1
    monkeypatch.setattr(sys, "argv", ["solver_size.py", "--threads", "2"])
    with pytest.raises(SystemExit, match="other threads"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["solver_size.py", "--methods", "wander"])
    with pytest.raises(SystemExit, match="no such method: wander"):
        bench.main()
