"""The text every Python brings along: the documentation topics of ``pydoc_data.topics``, in two disjoint halves.

Topics quote each other (``specialnames`` holds the whole of ``attribute-access``), so a split by topic name alone would
leave the same paragraphs on both sides. Topics that share a paragraph therefore stay together, a paragraph is used once
only, and the groups are dealt to the two halves, largest first, always to the shorter half.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from collections.abc import Mapping
from typing import Literal

Part = Literal["calibration", "measure"]

# Shorter paragraphs ("Note:", "See also") are common words, no sign that one topic quotes another.
_SHORTEST_QUOTE = 60


def split_topics(topics: Mapping[str, str]) -> tuple[str, str]:
    """The calibration half and the measuring half of some topics; no longer paragraph is in both.

    The halves depend on the topics alone: same topics, same halves, whatever the order of the mapping.
    """
    paragraphs = {name: re.split(r"\n[ \t]*\n", topics[name].strip("\n")) for name in sorted(topics)}
    seen: set[str] = set()
    texts: list[tuple[int, str]] = []
    for group in _groups(paragraphs):
        kept: list[str] = []
        for name in group:
            for paragraph in paragraphs[name]:
                key = _key(paragraph)
                if key not in seen:
                    kept.append(paragraph)
                if len(key) >= _SHORTEST_QUOTE:
                    seen.add(key)
        text = "\n\n".join(kept)
        texts.append((len(text), text))
    halves: tuple[list[str], list[str]] = ([], [])
    lengths = [0, 0]
    for length, text in sorted(texts, key=lambda item: (-item[0], item[1])):
        shorter = 0 if lengths[0] <= lengths[1] else 1
        halves[shorter].append(text)
        lengths[shorter] += length
    return "\n\n".join(halves[0]), "\n\n".join(halves[1])


def _key(paragraph: str) -> str:
    """A paragraph without its line breaks and indentation: quotes are often indented anew."""
    return " ".join(paragraph.split())


def _groups(paragraphs: Mapping[str, list[str]]) -> list[list[str]]:
    """Names that share a longer paragraph, directly or through others; groups and names in alphabetical order."""
    parent = {name: name for name in paragraphs}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for name, texts in paragraphs.items():
        for key in map(_key, texts):
            if len(key) >= _SHORTEST_QUOTE:
                one, other = sorted((root(first.setdefault(key, name)), root(name)))
                parent[other] = one
    groups: dict[str, list[str]] = {}
    for name in paragraphs:
        groups.setdefault(root(name), []).append(name)
    return [groups[name] for name in sorted(groups)]


@functools.cache
def _halves() -> tuple[str, str]:
    from pydoc_data.topics import topics

    return split_topics(topics)


def builtin_text(part: Part) -> str:
    """One half of the built-in text. It differs a little between Python versions; see `builtin_origin`."""
    return _halves()[0 if part == "calibration" else 1]


def builtin_origin(part: Part) -> str:
    """What the text was, for the protocol: half, Python version, and a hash that tells two texts apart."""
    digest = hashlib.sha256(builtin_text(part).encode()).hexdigest()[:12]
    return f"builtin ({part} half of pydoc_data.topics, Python {platform.python_version()}, sha256 {digest})"
