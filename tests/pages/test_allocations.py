"""Allocations on the page: as a file by itself, as what was asked of a pruned model, and whatever stands in them."""

from __future__ import annotations

import json

import pytest
import yaml

from secateur.allocation_file import AllocationFile, write_allocation
from secateur.errors import AllocationError, SparsityError, UsageError
from secateur.pages.collect import Collector
from secateur.pages.inputs import read_inputs
from secateur.pages.markdown import markdown
from secateur.pages.page import render_page
from secateur.pages.svg import clean
from tests.pages.made import HOSTILE, KINDS, pruning, study, write
from tests.pages.reading import Page

SIZES = {kind: [8, 8 * (number + 1)] for number, kind in enumerate(KINDS)}


def shares(blocks: int = 3, text: str = "") -> tuple[dict[str, float], dict[str, list[int]]]:
    """An allocation in which no two matrices have the same, and their shapes."""
    names = {f"model.layers.{b}.{kind}{text}.weight": kind for b in range(blocks) for kind in KINDS}
    return {n: 0.2 + 0.01 * i for i, n in enumerate(names)}, {n: SIZES[kind] for n, kind in names.items()}


def file(path, text: str = "", **origin):
    sparsities, shapes = shares(text=text)
    told = {"model": f"demo{text}", "allocation": f"owl{text}", "options": {}, **origin}
    write_allocation(path, AllocationFile(sparsities, shapes, 0.5, told))
    return path


def collect(*paths):
    return Collector(read_inputs(paths)).finish()


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_a_file_by_itself_is_a_whole_page(tmp_path, ending):
    path = file(tmp_path / f"alloc.{ending}")
    result = collect(path)
    sparsities, shapes = shares()
    sizes = {name: shapes[name][0] * shapes[name][1] for name in shapes}
    mean = sum(sizes[name] * value for name, value in sparsities.items()) / sum(sizes.values())
    (one,) = result.allocations
    assert one.sparsity == pytest.approx(mean)
    assert (one.least.name, one.most.name) == (min(sparsities, key=sparsities.get), max(sparsities, key=sparsities.get))
    assert result.command == f"secateur prune demo --allocation {path}"
    text = render_page(result)
    page = Page(text)
    assert page.ids("figure") == ["allocation-0"]
    cells = [given for tag, given in page.elements if tag == "rect" and given.get("class") == "cell"]
    assert len(cells) == len(sparsities)
    shades = [float(given["fill-opacity"]) for given in cells]
    assert (min(shades), max(shades)) == (0.0, 1.0)
    drawn = {(block, kind): value for block, kind, value in page.data["tables"]["allocation-0"]["rows"]}
    assert drawn == {(name.split(".")[2], ".".join(name.split(".")[3:5])): v for name, v in sparsities.items()}
    seen = page.text()
    for words in (f"Allocation alloc.{ending}, for demo", f"{mean:.2%}", "by owl", result.command, "not known"):
        assert words in seen
    assert [t for w, t in page.texts if w == "h1"] == [f"allocation alloc.{ending}"]
    assert page.data["result"] == json.loads(result.to_json())


def test_shades_go_up_with_what_was_asked(tmp_path):
    page = Page(render_page(collect(file(tmp_path / "alloc.yaml"))))
    cells = [given for _, given in page.elements if given.get("class") == "cell"]
    asked = {given["data-tip"]: float(given["fill-opacity"]) for given in cells}
    assert len(asked) == len(cells)
    by_share = sorted(asked, key=lambda tip: float(tip.split("\n")[1].split("%")[0]))
    assert [asked[tip] for tip in by_share] == sorted(asked.values())


def test_several_files_have_a_row_and_a_figure_each_and_no_one_command(tmp_path):
    result = collect(file(tmp_path / "a.yaml"), file(tmp_path / "b.yaml", model="other"))
    assert result.command == ""
    page = Page(render_page(result))
    assert page.ids("figure") == ["allocation-0", "allocation-1"]
    rows = page.data["tables"]["allocated"]["rows"]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("a.yaml", "demo", f"secateur prune demo --allocation {tmp_path / 'a.yaml'}"),
        ("b.yaml", "other", f"secateur prune other --allocation {tmp_path / 'b.yaml'}"),
    ]
    assert len(result.answer) == 3


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"allocation": "owl"}, "owl"),
        ({"allocation": "deep/down/alloc.yaml", "sparsity": None}, "alloc.yaml"),
        ({"allocation": "alloc.yaml", "sparsity": 0.7}, "alloc.yaml, moved to 70.0%"),
        ({"allocation": "uniform", "overrides": [{"match": "*", "sparsity": 0.1}]}, "uniform, with overrides"),
    ],
)
def test_a_pruned_model_shows_what_was_asked_beside_what_was_reached(tmp_path, recipe, name):
    asked, _ = shares()
    base = {"method": "wanda", "sparsity": 0.5, "structure": [], "pattern": "unstructured"}
    made = pruning(3, recipe=base | recipe, allocation=asked)
    result = collect(write(tmp_path / "uneven", made), write(tmp_path / "even", pruning(3)))
    (one,) = result.allocations
    assert (one.name, one.map.model, one.pruned, one.command) == (name, "uneven", True, "")
    page = Page(render_page(result))
    assert [key for key in page.ids("figure") if key.startswith(("allocation", "map"))] == [
        "allocation-0", "map-0", "map-1",
    ]  # fmt: skip
    assert f"Allocation {name}, asked of uneven" in page.text()
    assert {row[2] for row in page.data["tables"]["allocation-0"]["rows"]} == set(asked.values())
    reached = {m.sparsity for m in made.matrices}
    assert {row[2] for row in page.data["tables"]["map-0"]["rows"]} == reached != set(asked.values())


def test_a_file_beside_results_changes_nothing_of_the_answer(tmp_path):
    found = write(tmp_path / "s.json", study())
    alone, both = collect(found), collect(found, file(tmp_path / "alloc.yaml"))
    assert (both.answer, both.command, both.models) == (alone.answer, alone.command, alone.models)
    assert len(both.allocations) == 1
    assert "Allocation alloc.yaml" in Page(render_page(both)).text()


def test_markdown_has_the_table_and_not_the_cells(tmp_path):
    text = markdown(collect(file(tmp_path / "alloc.yaml")))
    assert text.startswith("# Report: allocation alloc.yaml\n")
    assert "| alloc.yaml | demo | owl | 21 |" in text
    assert "model.layers.1." not in text


@pytest.mark.parametrize("pruned", [False, True])
def test_hostile_names_are_text(tmp_path, pruned):
    told = HOSTILE.replace("\ud800", "")  # which no YAML file can hold
    if pruned:
        recipe = {"allocation": f"owl{HOSTILE}", "method": "wanda", "structure": []}
        path = write(tmp_path / "made", pruning(3, text=HOSTILE, recipe=recipe, allocation=shares(text=HOSTILE)[0]))
    else:
        path = file(tmp_path / "alloc.yaml", told)
    result = collect(path)
    text = render_page(result)
    page = Page(text)
    assert "img" not in page.tags
    assert text.lower().count("</script") == 2
    assert "<!--" not in text
    assert not any(name.startswith("on") for _, given in page.elements for name in given)
    tips = [given["data-tip"] for _, given in page.elements if "asked for" in given.get("data-tip", "")]
    assert tips
    assert all(clean(told) in tip for tip in tips)
    outside = markdown(result).split("```")
    assert not any("<" in part for part in outside[::2])


def test_what_is_no_text_in_a_file_is_not_shown(tmp_path):
    result = collect(file(tmp_path / "alloc.yaml", model=["demo"], allocation={"a": 1}))
    assert result.command.startswith("secateur prune MODEL --allocation ")
    assert (result.allocations[0].map.model, result.allocations[0].rule) == ("an unnamed model", "")


ONE = "matrices: {a.0.b.weight: {shape: [2, 2], sparsity: %s}}"


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("matrices: {}", AllocationError, "has no matrices"),
        ("- 1", AllocationError, "has no matrices"),
        ("{", AllocationError, "not a readable YAML"),
        ("[" * 5000, AllocationError, "not a readable YAML"),
        ("when: 2024-99-99", AllocationError, "not a readable YAML"),
        ("a: !!python/object/apply:os.system [x]", AllocationError, "not a readable YAML"),
        (ONE % "1.5", SparsityError, "not in"),
        (ONE % ".nan", SparsityError, "not in"),
        (ONE % str(10**400), SparsityError, "not in"),
        (ONE % "text", AllocationError, "the entry of a.0.b.weight"),
        ((ONE % "0.5").replace("[2, 2]", f"[2, {10**400}]"), AllocationError, "the entry of"),
        ((ONE % "0.5").replace("[2, 2]", "[2, -2]"), AllocationError, "the entry of"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, kind, words):
    (tmp_path / "alloc.yaml").write_text(content)
    with pytest.raises(kind, match=words) as error:
        read_inputs([tmp_path / "alloc.yaml"])
    assert error.value.hint


def test_a_file_that_grows_when_it_is_written_out_is_told_in_few_words(tmp_path):
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    bomb = "\n".join(["a0: &a0 [x]", *levels, "model: *a29", "matrices: {m.0.w: {shape: *a29, sparsity: 0.5}}"])
    (tmp_path / "alloc.yaml").write_text(bomb)
    with pytest.raises(AllocationError, match=r"the entry of m\.0\.w"):
        read_inputs([tmp_path / "alloc.yaml"])
    whole = bomb.replace("shape: *a29", "shape: [2, 2]")
    (tmp_path / "alloc.yaml").write_text(whole)
    assert yaml.safe_load(whole)["model"]
    assert len(render_page(collect(tmp_path / "alloc.yaml"))) < 100_000


def test_a_result_that_asks_for_no_share_is_refused(tmp_path):
    made = pruning(3, allocation={"model.layers.0.x.weight": 1e300})
    with pytest.raises(UsageError, match=r"asks 1e\+300 of model\.layers\.0\.x\.weight"):
        collect(write(tmp_path / "a", made))
