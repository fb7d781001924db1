"""Reporters that keep what they are told."""

from __future__ import annotations

from secateur.progress import Reporter


class Notes(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)
