"""The built-in text: two halves that share nothing, the same every time."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from secateur.corpus.builtin import builtin_origin, builtin_text, split_topics


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text)]


def test_halves_share_no_longer_paragraph():
    calibration, measure = (
        {p for p in paragraphs(builtin_text(part)) if len(p) >= 60} for part in ("calibration", "measure")
    )
    assert len(calibration) > 100
    assert len(measure) > 100
    assert not calibration & measure


def test_halves_are_of_similar_length():
    lengths = [len(builtin_text("calibration")), len(builtin_text("measure"))]
    assert min(lengths) > 0.8 * max(lengths)


def test_every_paragraph_of_the_topics_is_used():
    from pydoc_data.topics import topics

    there = set(paragraphs(builtin_text("calibration"))) | set(paragraphs(builtin_text("measure")))
    for text in topics.values():
        assert set(paragraphs(text.strip("\n"))) <= there


def test_origin_tells_the_halves_apart():
    assert "calibration half" in builtin_origin("calibration")
    assert builtin_origin("calibration").split("sha256")[1] != builtin_origin("measure").split("sha256")[1]


LONG = st.text("abcdef ", min_size=60, max_size=80).filter(lambda text: len(" ".join(text.split())) >= 60)


@given(st.dictionaries(st.text("xyz", min_size=1), st.lists(LONG, min_size=1, max_size=3), max_size=6), LONG)
def test_any_topics_split_disjointly_whatever_their_order(content, quoted):
    topics = {name: "\n\n".join(texts) for name, texts in content.items()}
    # Two topics quote the same paragraph, one of them indented: they must land on the same side.
    topics["quoting one"] = "own words\n\n" + quoted
    topics["quoting two"] = "   " + quoted
    halves = split_topics(topics)
    assert halves == split_topics(dict(reversed(topics.items())))
    longer = [{p for p in paragraphs(half) if len(p) >= 60} for half in halves]
    assert not longer[0] & longer[1]
    assert longer[0] | longer[1] == {p for text in topics.values() for p in paragraphs(text) if len(p) >= 60}
