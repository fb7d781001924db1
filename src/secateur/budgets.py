"""Budgets: what a pruned model may have of something, as ``KEY=VALUE``; and sizes in bytes with their units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from secateur.errors import BudgetError, UnknownNameError

Key = Literal["parameters", "bytes", "decode"]
KEYS: tuple[Key, ...] = ("parameters", "bytes", "decode")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
EXAMPLES = "parameters=0.75, bytes=150MB, bytes=0.75 or decode=1.5x"


@dataclass(frozen=True)
class Budget:
    """At most that much may stay; of ``decode``: at least that many times as fast."""

    text: str
    key: Key
    value: float
    """A share in (0, 1) of what there is, bytes where ``absolute`` is set, or times faster."""
    absolute: bool = False

    def limit(self, whole: float) -> float:
        """The most that may stay, in the unit of ``whole``, which is what there is."""
        if self.absolute:
            return self.value
        return whole / self.value if self.key == "decode" else whole * self.value


def parse_budget(text: str) -> Budget:
    """Read ``parameters=0.75``, ``bytes=150MB``, ``bytes=0.75`` or ``decode=1.5x``.

    Raises:
        BudgetError: for a text of another form, or a value that makes no sense.
        UnknownNameError: for another key; the nearest is suggested.
    """
    raw, equals, said = text.partition("=")
    name, said = raw.strip().lower(), said.strip()
    if not equals or not name or not said:
        raise BudgetError(f"budget '{text}' is not KEY=VALUE", hint=f"for example {EXAMPLES}")
    if name not in KEYS:
        raise UnknownNameError("budget", raw.strip(), KEYS)
    key: Key = name
    if key == "decode":
        times = _number(said.removesuffix("x").removesuffix("X"))
        if times is None or times <= 1:
            raise BudgetError(f"budget '{text}' asks for no gain", hint="give times faster, more than 1: decode=1.5x")
        return Budget(text, key, times)
    share = _number(said)
    if share is not None and 0 < share < 1:
        return Budget(text, key, share)
    if key == "parameters":
        raise BudgetError(
            f"budget '{text}' is no share", hint="give the share of the block parameters that may stay, between 0 and 1"
        )
    size = parse_size(said) if share is None else None
    if not size:
        raise BudgetError(
            f"budget '{text}' is no size",
            hint="give bytes with a unit (B, KB, MB, GB, KiB, MiB, GiB), such as 150MB, or a share between 0 and 1",
        )
    return Budget(text, key, float(size), absolute=True)


def parse_size(text: str) -> int | None:
    """Bytes of a size such as ``2GB`` or ``500 MiB``, of plain digits as they are; None when the text is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), flags=re.IGNORECASE)
    if not match or match[2].upper() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()])


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)", text.strip()) else None
