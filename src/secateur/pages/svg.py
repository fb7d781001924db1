"""Charts as SVG: scales, axes, and marks. Every text and attribute is escaped here, so a chart may show any name."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 34, 48
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


def clean(text: object) -> str:
    """A text without characters that HTML and XML do not allow; each becomes the sign for that."""
    return _CONTROL.sub("\ufffd", str(text))


def element(tag: str, text: object = None, **attributes: object) -> str:
    """One element; ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; a text is escaped."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{given}/>" if text is None else f"<{tag}{given}>{html.escape(clean(text))}</{tag}>"


def _attribute(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else clean(value)


@dataclass(frozen=True)
class Scale:
    """Values to places along one axis; logarithmic when the values span more than two orders of magnitude."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Scale:
        """A scale that holds all values, with some room; ``zero`` keeps 0 in it."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if log and low > 0:
            low, high = math.log10(low), math.log10(high)
            room = 0.05 * (high - low) or 0.05
            return cls(low - room, high + room, start, end, True)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low if zero and low == 0 else low - room, high if zero and high == 0 else high + room, start, end)

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside, from four to nine of them or so."""
        if self.log:
            first, last = math.floor(self.low), math.ceil(self.high)
            for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8)):
                found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                inside = [value for value in found if self.low <= math.log10(value) <= self.high]
                if len(inside) >= 4 or len(steps) > 6:
                    return inside[:: max(1, len(inside) // 8)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.99)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def short(value: float) -> str:
    """A number for an axis: ``1.5 M``, ``0.25``, ``12``."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.4g}{unit}"
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


@dataclass
class Chart:
    """A drawing area with two axes; marks are added in the order in which they lie over each other."""

    x_title: str
    y_title: str
    height: int = HEIGHT
    parts: list[str] = field(default_factory=list)

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def add(self, tag: str, text: object = None, **attributes: object) -> None:
        self.parts.append(element(tag, text, **attributes))

    def text(self, x: float, y: float, text: object, *, anchor: str = "start", class_: str = "label") -> None:
        self.add("text", text, x=x, y=y, text_anchor=anchor, class_=class_)

    def axes(self, x: Scale | None, y: Scale) -> None:
        """Grid, ticks and titles; an x of None has names under its places instead of numbers, see `names`."""
        for value in y.ticks():
            place = y(value)
            self.add("line", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place, class_="grid")
            self.text(LEFT - 8, place + 4, short(value), anchor="end", class_="tick")
        for value in x.ticks() if x is not None else ():
            place = x(value) if x is not None else 0.0
            self.add("line", x1=place, x2=place, y1=TOP, y2=self.bottom, class_="grid")
            self.text(place, self.bottom + 17, short(value), anchor="middle", class_="tick")
        self.text((LEFT + WIDTH - RIGHT) / 2, self.height - 8, self.x_title, anchor="middle", class_="axis")
        middle = (TOP + self.bottom) / 2
        self.add(
            "text",
            self.y_title,
            x=15,
            y=middle,
            text_anchor="middle",
            class_="axis",
            transform=f"rotate(-90 15 {middle:g})",
        )

    def names(self, names: Sequence[str]) -> list[float]:
        """Write names under equally wide places, every second or third where there are many; the middles come back."""
        wide = (WIDTH - RIGHT - LEFT) / max(len(names), 1)
        middles = [LEFT + wide * (number + 0.5) for number in range(len(names))]
        longest = max((len(name) for name in names), default=1)
        each = max(1, math.ceil(longest * 7.5 / wide))
        for number in range(0, len(names), each):
            self.text(middles[number], self.bottom + 17, names[number], anchor="middle", class_="tick")
        return middles

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Names of the classes of marks, in one row on top: (class, name)."""
        x = float(LEFT)
        budget = (WIDTH - RIGHT - LEFT) / max(len(entries), 1)
        for class_, name in entries:
            told = cut(name, max(6, int((budget - 24) / 6.6)))
            self.add("rect", x=x, y=10, width=11, height=11, rx=2, class_=f"mark {class_}")
            self.text(x + 16, 20, told, class_="legend")
            x += min(budget, 32 + 6.8 * len(told))

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.add("path", d=path, class_=f"line {class_}")

    def render(self, label: str) -> str:
        """The whole drawing; ``label`` says to a reader who sees nothing what it is."""
        start = f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{html.escape(clean(label))}">'
        return f"{start}{''.join(self.parts)}</svg>"


def cut(text: str, length: int) -> str:
    """A text that is no longer than that."""
    return text if len(text) <= length else text[: length - 1] + "…"
