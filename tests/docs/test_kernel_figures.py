"""The tables and the plot of the kernels' benchmark: each figure stands where its size, format and threads are."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from tests.docs.test_solver_size import ROOT, generator  # noqa: F401

FORMATS = ("dense int8", "mask int8 50 %", "2:4 int8")
SIZES = ("64x64", "128x64")


@pytest.fixture
def found(generator, tmp_path, monkeypatch):  # noqa: F811
    """Numbers that are all different, in a folder of their own."""
    rows = []
    for size in SIZES:
        for threads in (1, 2):
            for name in FORMATS:
                n = len(rows) + 1
                dense = name.startswith("dense")
                rows.append({"rows x columns": size, "threads": threads, "format": name, "bits per weight": 8.0,
                             "microseconds": float(n), "of reading": n / 100,
                             "times dense": None if dense else 1 + n / 50})  # fmt: skip
    machine = {"processor": "p", "cores": 2, "threads": 1, "python": "3", "torch": "2", "transformers": "5"}
    data = {"protocol": "told", "command": "c", "commit": "x", "machine": machine, "rows": rows}
    place = tmp_path / "benchmarks" / "results"
    place.mkdir(parents=True)
    (place / "kernels.json").write_text(json.dumps(data))
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    return rows


def test_every_figure_is_in_its_cell(generator, found):  # noqa: F811
    lines = [line for line in generator.kernel_speeds().splitlines() if line.startswith("|")]
    heads = [line.split("|") for line in lines if "bits a weight" in line]
    assert [head[1].strip() for head in heads] == ["1 thread", "2 threads"]
    threads, seen = 0, 0
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "bits a weight" in line:
            threads += 1
        elif cells[0] in FORMATS:
            for size, cell in zip(SIZES, cells[2:], strict=True):
                (row,) = [
                    r for r in found if (r["threads"], r["format"], r["rows x columns"]) == (threads, cells[0], size)
                ]
                times = f"{row['times dense']:.2f} " if row["times dense"] else ""
                assert cell == f"{times}({row['of reading']:.0%})"
                seen += 1
    assert seen == len(found)


def test_the_plot_shows_formats_of_one_thread(generator, found):  # noqa: F811
    tree = ET.fromstring(generator.DRAWINGS["docs/kernel-speed.svg"]())
    space = "{http://www.w3.org/2000/svg}"
    names = {text.text for text in tree.iter(f"{space}text") if text.get("class") == "name"}
    assert names == {"dense int8", "mask int8 50 %"}
    assert len(list(tree.iter(f"{space}circle"))) == len(names) * len(SIZES)


def test_without_a_measurement_there_is_nothing(generator, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert "Not measured yet" in generator.kernel_speeds()
    assert generator.DRAWINGS["docs/kernel-speed.svg"]() is None
