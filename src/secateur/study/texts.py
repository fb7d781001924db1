"""The texts of a study: found, divided where two of them are the same, and seen to have nothing in common"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.corpus.examples import Examples, load_examples
from secateur.corpus.labelled import Labelled, read_labelled
from secateur.corpus.load import Text, load_text
from secateur.errors import CalibrationError, StudyError
from secateur.study.spec import StudySpec

RUN_WORDS = 32
"""So many words in the same order are a quotation, not a common phrase."""
LINE_LETTERS = 60
"""A line of so many letters is no heading and no common phrase; languages without spaces are compared by lines."""
ALLOWED = 0.01
"""Share of a text that may be in another one: boilerplate that a corpus repeats."""


@dataclass(frozen=True)
class Texts:
    """What is learned from, what settings are compared on, and what finalists are measured on."""

    calibration: Text
    choice: Text
    test: Text
    training: tuple[Text, ...] = ()
    """Further texts that recovery learns from."""
    labelled: Mapping[str, Labelled] = field(default_factory=dict)
    """The same with their labels, by name (training 0, ...); the texts are their JSONL then. Empty without labels."""

    @property
    def digests(self) -> dict[str, str]:
        """What each text was, for the identity of a study."""
        named = {"calibration": self.calibration, "choice": self.choice, "test": self.test}
        named |= {f"training {number}": text for number, text in enumerate(self.training)}
        return {name: hashlib.sha256(text.text.encode()).hexdigest() for name, text in named.items()}

    @property
    def origins(self) -> dict[str, str]:
        """What each text is, in words."""
        return {"calibration": self.calibration.origin, "choice": self.choice.origin, "test": self.test.origin}


def read_texts(spec: StudySpec) -> Texts:
    """The texts that a study names.

    Raises:
        CalibrationError: when one is missing or empty, or too short to be divided.
        StudyError: when two of them overlap.
    """
    data = spec.data
    calibration = load_text(data.calibration, "calibration")
    choice = load_text(data.choice, "measure")
    if data.choice == data.test:
        first, second = halves(choice.text)
        if not first or not second:
            raise CalibrationError(f"{choice.origin} is too short to be divided into choice and test",
                                   hint="give a longer text, or one file for each")  # fmt: skip
        choice, test = (Text(part, f"{which} half of {choice.origin}")
                        for part, which in ((first, "first"), (second, "second")))  # fmt: skip
    else:
        test = load_text(data.test, "measure")
    texts = Texts(
        calibration, choice, test, tuple(load_text(name, "calibration") for name in spec.training_texts)
    )  # fmt: skip
    check_apart(texts)
    return texts


def read_examples(spec: StudySpec, names: Sequence[str] | None) -> Texts:
    """The labelled texts that a study names, with their labels.

    Args:
        names: those of the classes; None takes them from the calibration data, which the model is fine-tuned on.

    Raises:
        CalibrationError: when one is missing, empty or malformed, or has a label that is no class.
        StudyError: when two of them overlap.
    """
    data = spec.data
    found = {"calibration": load_examples(data.calibration, data.source, names)}
    names = found["calibration"].labelled.names
    found["choice"] = load_examples(data.choice, data.source, names)
    if data.choice == data.test:
        whole, count = found["choice"], len(found["choice"].labelled.texts)
        if count < 2:
            raise CalibrationError(f"{whole.origin} is too short to be divided into choice and test",
                                   hint="give a longer file, or one for each")  # fmt: skip
        found["choice"] = whole.of(0, count // 2, f"first half of {whole.origin}")
        found["test"] = whole.of(count // 2, None, f"second half of {whole.origin}")
    else:
        found["test"] = load_examples(data.test, data.source, names)
    for number, name in enumerate(spec.training_texts):
        found[f"training {number}"] = Examples(read_labelled(name, labels=dict(enumerate(names))), name)
    told = {name: Text(one.rows, one.origin) for name, one in found.items()}
    texts = Texts(
        told.pop("calibration"), told.pop("choice"), told.pop("test"), tuple(told.values()),
        {name: one.labelled for name, one in found.items()},
    )  # fmt: skip
    check_apart(texts)
    return texts


def halves(text: str) -> tuple[str, str]:
    """A text in two parts that share nothing, cut at the paragraph, line or word nearest to its middle."""
    middle = len(text) // 2
    for mark in ("\n\n", "\n", " "):
        ends = [place for place in (text.rfind(mark, 0, middle), text.find(mark, middle)) if place >= 0]
        if ends:
            at = min(ends, key=lambda place: abs(place - middle))
            if text[:at].strip() and text[at:].strip():
                return text[:at], text[at:].lstrip()
    return text[:middle], text[middle:]


def check_apart(texts: Texts) -> None:
    """Refuse texts that hold parts of each other, by their content, whatever the files are called.

    Raises:
        StudyError: naming the two, how much they share, and a passage.
    """
    named = {"calibration": texts.calibration, "choice": texts.choice, "test": texts.test}
    named |= {f"training {number}": text for number, text in enumerate(texts.training)}
    learned = [name for name in named if name not in ("choice", "test")]
    for one, other in [("choice", "test"), *((own, name) for own in learned for name in ("choice", "test"))]:
        if texts.labelled:
            share, passage = repeated(texts.labelled[one].texts, texts.labelled[other].texts)
        else:
            share, passage = overlap(named[one].text, named[other].text)
        if share > ALLOWED:
            raise StudyError(
                f"the texts of {one.replace('training', 'recovery')} ({named[one].origin}) and {other} "
                f"({named[other].origin}) overlap: {share:.0%} of one is in the other, for example '{passage[:80]}'",
                hint="give texts that share nothing, or figures on them say nothing about new text",
            )


def repeated(one: Sequence[str], other: Sequence[str]) -> tuple[float, str]:
    """The larger of the shares of texts that are among the others too, and one that is.

    Case, punctuation and spaces do not count.
    """
    sides = [[" ".join(_words(text)) or text for text in side] for side in (one, other)]
    shared = set(sides[0]) & set(sides[1])
    return max(sum(text in shared for text in side) / len(side) for side in sides), min(shared, default="")


def overlap(one: str, other: str) -> tuple[float, str]:
    """The larger of the shares that two texts have of each other, and a passage that both hold.

    Two ways of comparing, of which the larger counts: runs of `RUN_WORDS` words wherever they stand, and whole lines of
    `LINE_LETTERS` letters or more. Case, punctuation at the ends of words, line breaks and indentation do not count.
    """
    found = [_runs_in(_words(one), _words(other)), _runs_in(_words(other), _words(one))]
    found += [_lines_in(one, other), _lines_in(other, one)]
    return max(found, key=lambda pair: pair[0])


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def _runs_in(words: Sequence[str], other: Sequence[str]) -> tuple[float, str]:
    """Share of ``words`` that is covered by runs which ``other`` has too, and one of them."""
    length = min(RUN_WORDS, len(words))
    if not length or len(other) < length or length < RUN_WORDS // 4:
        return 0.0, ""
    known = {hash(tuple(other[at : at + length])) for at in range(len(other) - length + 1)}
    covered, reached, passage = 0, 0, ""
    for at in range(len(words) - length + 1):
        if hash(tuple(words[at : at + length])) in known:
            passage = passage or " ".join(words[at : at + length])
            covered += at + length - max(reached, at)
            reached = at + length
    return covered / len(words), passage


def _lines_in(text: str, other: str) -> tuple[float, str]:
    known = set(_lines(other))
    mine = list(_lines(text))
    shared = [line for line in mine if line in known]
    return sum(map(len, shared)) / max(1, sum(map(len, mine))), next(iter(shared), "")


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        plain = " ".join(line.lower().split())
        if len(plain) >= LINE_LETTERS:
            yield plain
