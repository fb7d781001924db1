"""The code fences of a document, in order, with the mark that stands above each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")
FENCE = re.compile(
    r"(?:^(?P<mark><!--[^\n]*-->)\n)?^```(?P<language>[a-z]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Fence:
    """One fence; ``not_run`` is the reason why it is not run, empty when it is."""

    language: str
    body: str
    not_run: str


def fences(document: Path) -> list[Fence]:
    """All fences of a document. bash and python fences are run unless a comment above says why not."""
    found = []
    for match in FENCE.finditer(document.read_text(encoding="utf-8")):
        marked = NOT_RUN.fullmatch(match["mark"] or "")
        found.append(Fence(match["language"], match["body"], marked["reason"] if marked else ""))
    return found
