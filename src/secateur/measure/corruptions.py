"""Corruptions of a text: the small damage of everyday writing. The same seed makes the same damage, on any machine.

``typos`` swaps two neighbouring letters inside words, ``case`` writes words in capitals (or in small letters where they
were in capitals), ``dropped`` leaves words out. Words are what stands between spaces; the spaces stay as they are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import numpy as np

from secateur.seeds import derived_seed

SHARE = 0.15
"""Of the words that are damaged."""
_LETTERS = 4
"""Shorter words are not misspelt: a swap would often make another word of them."""


def corrupt(text: str, name: str, *, seed: int = 0, part: int = 0) -> str:
    """A damaged copy of a text.

    Args:
        name: one of `CORRUPTIONS`.
        part: number of the text, so that several texts are damaged in different places.
    """
    damage = CORRUPTIONS[name]
    draw = random.Random(derived_seed(seed, "corruption", name, part))
    pieces = re.findall(r"\s*\S+|\s+$", text)
    return "".join(damage(piece, draw) if draw.random() < SHARE else piece for piece in pieces)


def align(clean: Sequence[int], corrupted: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of places (in the clean tokens, in the corrupted ones) that hold the same token, both in rising order.

    There are as many as there can be: a longest common subsequence. Memory: 4 bytes for every pair of places.
    """
    first, second = np.asarray(clean), np.asarray(corrupted)
    longest = np.zeros((len(first) + 1, len(second) + 1), dtype=np.int32)  # of the first i and the first j tokens
    for i, token in enumerate(first):
        longest[i + 1, 1:] = np.maximum.accumulate(np.maximum(longest[i, 1:], longest[i, :-1] + (second == token)))
    pairs = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif longest[i - 1, j] >= longest[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _typos(word: str, draw: random.Random) -> str:
    places = [i for i in range(len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha() and word[i] != word[i + 1]]
    if sum(letter.isalpha() for letter in word) < _LETTERS or not places:
        return word
    place = places[int(draw.random() * len(places))]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _case(word: str, draw: random.Random) -> str:
    return word.lower() if word.isupper() else word.upper()


def _dropped(word: str, draw: random.Random) -> str:
    return ""


CORRUPTIONS: dict[str, Callable[[str, random.Random], str]] = {"typos": _typos, "case": _case, "dropped": _dropped}
"""Name -> what it does to one word, the space before it included."""
