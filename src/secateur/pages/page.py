"""One HTML file that needs nothing else: no network, no other file, no code but its own, named in its policy."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from secateur.errors import MissingExtraError
from secateur.pages.figures import Figure
from secateur.pages.sections import Section, Table, sections, shown, title_of
from secateur.pages.svg import clean
from secateur.report_result import ReportResult

_HERE = Path(__file__).parent


def check_extra() -> None:
    """Refuse early where pages cannot be made.

    Raises:
        MissingExtraError: without Jinja2.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "a page needs the extra 'report'", hint="run: pip install 'secateur[report]', or use --format md"
        ) from None


def render_page(result: ReportResult) -> str:
    """The whole page.

    Every text of the result is escaped: by Jinja2 in the HTML, by `svg.element` in the drawings, and in the data by
    writing ``<``, ``>`` and ``&`` as JSON escapes, so that no text can end the element that it is in.

    Raises:
        MissingExtraError: without Jinja2.
    """
    check_extra()
    import jinja2
    from markupsafe import Markup

    parts = sections(result)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip
    environment.filters["shown"] = lambda value, column: shown(column, value)
    return environment.get_template("template.html").render(
        result=result,
        title=title_of(result),
        recommended=None if result.recommended is None else result.models[result.recommended],
        sections=parts,
        data=Markup(data_json(result, parts)),
        drawing=Markup,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def data_json(result: ReportResult, parts: list[Section]) -> str:
    """The data of the page: the result as `--format json` prints it, and the rows of every figure and table."""
    rows: dict[str, Any] = {}
    for section in parts:
        several: list[Figure | Table] = [*section.figures, *section.tables]
        for one in several:
            rows[one.key] = {"columns": one.columns, "rows": one.rows}
    text = json.dumps({"result": result.to_dict(), "tables": rows}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finalize(value: Any) -> Any:
    """Characters that HTML does not allow, out of prompts and tokens, become the sign for that."""
    return clean(value) if type(value) is str else value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
