"""Globs and ``re:`` patterns over parameter names. A pattern that matches nothing is an error, never a silence."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence

from secateur.errors import TargetError


def matches(pattern: str, name: str) -> bool:
    """Whether a glob (``*down_proj*``) or regular expression (``re:layers\\.[0-3]\\.``) names a parameter.

    Globs match the whole name, or the name without ``.weight``; regular expressions match anywhere.

    Raises:
        TargetError: when the regular expression cannot be compiled.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"'{pattern}' is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def select(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """Names a pattern matches.

    Raises:
        TargetError: when there is none; the nearest name is suggested.
    """
    found = [name for name in names if matches(pattern, name)]
    if not found:
        close = difflib.get_close_matches(pattern.strip("*"), names, n=1, cutoff=0.0)
        hint = "`secateur inspect` lists the matrices"
        if close:
            hint += f"; one of them is {close[0]}"
        raise TargetError(f"{what} '{pattern}' matches no prunable matrix", hint=hint)
    return found
