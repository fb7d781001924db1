"""The page without a browser: whole, alone, safe, and the same data as the JSON."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from secateur.pages import page as page_module
from secateur.pages.collect import Collector
from secateur.pages.inputs import read_inputs
from secateur.pages.markdown import markdown
from secateur.pages.page import render_page
from secateur.pages.svg import clean
from secateur.report_result import ReportResult
from tests.pages.made import HOSTILE, bench, examined, pruning, recovery, study, write
from tests.pages.reading import Page


def report(tmp_path, *, text: str = "", trials: int = 12) -> ReportResult:
    """A report of everything at once."""
    paths = [
        write(tmp_path / "pruned", pruning(text=text)),
        write(tmp_path / "recovered", recovery()),
        write(tmp_path / "study.json", study(trials, text=text)),
        write(tmp_path / "bench.json", bench(str(tmp_path / "pruned"), text=text)),
    ]
    result = Collector(read_inputs(paths)).finish()
    result.examined = [examined("pruned", text=text), examined("recovered", text=text)]
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    result = report(tmp_path_factory.mktemp("inputs"))
    return result, render_page(result)


def test_nothing_is_fetched_from_anywhere(made):
    _, text = made
    page = Page(text)
    assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}", text, re.IGNORECASE)
    assert page.tags & {"link", "img", "iframe", "object", "embed", "base"} == set()
    for tag, given in page.elements:
        assert "src" not in given, tag
        assert given.get("href", "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in given), (tag, given)


def test_the_policy_names_the_very_code_of_the_page(made):
    _, text = made
    policy = next(given["content"] for tag, given in Page(text).elements if "http-equiv" in given)
    assert "default-src 'none'" in policy
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_every_figure_is_there_with_its_data(made):
    result, text = made
    page = Page(text)
    figures = page.ids("figure")
    assert len(figures) == len(set(figures)) == sum(tag == "svg" for tag, _ in page.elements)
    for comparison, number in zip(result.comparisons, range(9), strict=False):
        for front in comparison.fronts:
            assert f"front-{number}-{front.axis}" in figures
    for key in (
        "map-0",
        "sensitivity",
        "frequency-0",
        "position-0",
        "spread-0-angle",
        "spread-1-margin",
        "boxes-0-angle",
        "boxes-1-margin",
        "damage-0",
    ):
        assert key in figures
    asked = {given["data-rows"] for _, given in page.elements if "data-rows" in given}
    assert asked == set(page.data["tables"])
    assert all(len(row) == len(table["columns"]) for table in page.data["tables"].values() for row in table["rows"])


def test_the_data_of_the_page_is_the_result(made):
    result, text = made
    assert Page(text).data["result"] == json.loads(result.to_json())


def test_axes_without_data_are_named_with_the_reason(made):
    _, text = made
    seen = Page(text).text()
    assert "No front for energy" in seen
    assert "no meter on this machine" in seen


def test_hostile_text_is_text_everywhere(tmp_path):
    plain, hostile = report(tmp_path / "a"), report(tmp_path / "b", text=HOSTILE)
    text = render_page(hostile)
    page = Page(text)
    assert page.tags == Page(render_page(plain)).tags
    assert "img" not in page.tags
    assert text.lower().count("</script") == 2
    assert "<!--" not in text
    assert not any(name.startswith("on") for _, given in page.elements for name in given)
    assert clean(HOSTILE) in page.text()
    assert page.data["result"]["examined"][0]["broken"][0]["token"] == f" it{HOSTILE}"
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    tips = [given["data-tip"] for _, given in page.elements if "data-tip" in given]
    assert any(clean(HOSTILE) in tip for tip in tips)


def test_hostile_text_means_nothing_in_markdown(tmp_path):
    text = markdown(report(tmp_path, text=HOSTILE))
    outside = re.sub(r"^(`{3,})bash\n.*?\n\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in outside
    assert "\x1b" not in text
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_markdown_has_the_answer_and_the_tables(made):
    result, _ = made
    text = markdown(result)
    assert result.command in text
    for title in (
        "All models",
        "Clean and damaged text",
        "Loss by frequency",
        "What matters most",
        "continued by both",
    ):
        assert title in text


def test_five_hundred_trials_make_a_page_that_is_not_large(tmp_path):
    path = write(tmp_path / "study.json", study(500, blocks=8))
    text = render_page(Collector(read_inputs([path])).finish())
    assert len(text.encode()) < 2_500_000
    assert len(Page(text).data["result"]["models"]) >= 503


def test_without_jinja_the_hint_says_how_to_get_it(made, monkeypatch):
    import sys

    from secateur.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="report") as error:
        page_module.render_page(made[0])
    assert "secateur[report]" in error.value.hint


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_files_that_are_no_code_lie_beside_the_code():
    from importlib.resources import files

    for name in ("template.html", "page.css", "page.js"):
        assert (files("secateur.pages") / name).is_file()


BUTTONS = """
const files = {};
const Plain = Blob;
window.Blob = class extends Plain { constructor(parts, given) { super(parts, given); this.told = parts[0]; } };
URL.createObjectURL = (blob) => { files[blob.type] = blob.told || blob.size; return "blob:nothing"; };
for (const button of document.querySelector("figure").querySelectorAll(".tools button")) button.click();
const heads = [...document.querySelectorAll("#models-0 th button")];
const values = () => [...document.querySelectorAll("#models-0 tbody tr")].map((row) => row.cells[2].dataset.v);
heads[2].click();
const up = values();
heads[2].click();
const down = values();
const paper = {};
for (let i = 0; i < 2; i++) {
  document.getElementById("theme").click();
  paper[document.documentElement.dataset.theme] = getComputedStyle(document.body).backgroundColor;
}
setTimeout(() => {
  document.body.dataset.found = JSON.stringify({ files, up, down, paper });
}, 1500);
"""
"""Presses the buttons of the first figure, sorts the first table by its third column both ways, tries both themes."""


def in_chromium(text: str, tmp_path) -> Page:
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=4000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Page(done.stdout)


def also_runs(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are made from here on end with this script, which their policy then names."""
    read = page_module.Path.read_text
    monkeypatch.setattr(
        page_module.Path, "read_text",
        lambda path, **given: read(path, **given) + (script if path.name == "page.js" else ""),
    )  # fmt: skip


WIDTHS = """
for (const part of document.querySelectorAll("figure, .block")) part.style.contentVisibility = "visible";
parent.postMessage([innerWidth, document.documentElement.scrollWidth], "*");
"""
"""Lays out also what is far below, and tells how wide the page is."""
PHONE = """<body><iframe width="360" height="800" src="report.html"></iframe>
<script>addEventListener("message", (told) => { document.body.dataset.found = JSON.stringify(told.data); });</script>
<script type="application/json">{}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path, monkeypatch):
    """Figures and tables scroll in boxes of their own, and long names are broken."""
    also_runs(WIDTHS, monkeypatch)
    text = render_page(report(tmp_path / "in", text="long-name_" * 30))
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = in_chromium(PHONE, tmp_path)
    (found,) = [json.loads(given["data-found"]) for _, given in page.elements if "data-found" in given]
    wide, needed = found
    assert wide <= 360
    assert needed <= wide


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_runs_the_code_and_nothing_of_the_text(tmp_path, monkeypatch):
    also_runs(BUTTONS, monkeypatch)
    page = in_chromium(render_page(report(tmp_path / "in", text=HOSTILE)), tmp_path)
    buttons = [given.get("title", "") for tag, given in page.elements if tag == "button"]
    figures = sum(tag == "figure" for tag, _ in page.elements)
    assert buttons.count("save the figure as SVG") == buttons.count("save the figure as PNG") == figures > 0
    assert buttons.count("sort by this column") == sum(tag == "th" for tag, _ in page.elements)
    assert "img" not in page.tags
    found = json.loads(next(given["data-found"] for tag, given in page.elements if "data-found" in given))
    files = found["files"]
    assert sorted(files) == ["image/png", "image/svg+xml", "text/csv;charset=utf-8"]
    assert files["image/png"] > 1000
    drawing = ElementTree.fromstring(files["image/svg+xml"])
    assert not any("class" in one.attrib for one in drawing.iter())  # the style sheet stays behind
    assert {one.attrib["fill"] for one in drawing.iter("{http://www.w3.org/2000/svg}circle")} - {"none"}
    told, rows = (
        page.data["tables"][page.ids("figure")[0]],
        list(csv.reader(io.StringIO(files["text/csv;charset=utf-8"]))),
    )
    assert rows[0] == told["columns"]
    assert [[float(cell) for cell in row[2:4]] for row in rows[1:]] == [row[2:4] for row in told["rows"]]
    values = [float(value) for value in found["up"]]
    assert values == sorted(values)
    assert found["down"] == found["up"][::-1]
    light, dark = (sum(map(int, re.findall(r"\d+", found["paper"][theme])[:3])) for theme in ("light", "dark"))
    assert light > 700
    assert dark < 120


def test_boxes_are_the_quantiles_of_every_text(made):
    result, text = made
    one = next(one for one in result.examined if one.conditions)
    table = Page(text).data["tables"]["boxes-0-margin"]
    expected = [
        [d.condition, side, *getattr(d, side)]
        for d in one.distributions if d.quantity == "margin" for side in ("dense", "pruned")
    ]  # fmt: skip
    assert table["rows"] == expected
    assert [row[0] for row in expected[::2]] == ["clean", "typos", "case", "dropped"]
