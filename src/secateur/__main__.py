"""``python -m secateur`` is the command ``secateur``."""

from __future__ import annotations

from secateur.cli.app import entry

if __name__ == "__main__":
    entry()
