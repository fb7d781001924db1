"""What the tests of bad input to `recover` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import (
    SecateurError,
)


def _listing(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(kind: type[SecateurError], words: str, model: Any, out: Path, **options: Any) -> SecateurError:
    """Exactly this error, one line, with a hint, exit status 2, and no file made or changed anywhere near."""
    before = _listing(out.parent)
    options = {"evaluate": False, "verify": False, **options}
    with pytest.raises(SecateurError) as caught:
        secateur.recover(model, out, **options)
    error = caught.value
    assert type(error) is kind, error
    for word in words.split("|"):
        assert word in error.message + " " + error.hint, (error.message, error.hint)
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint
    assert error.hint
    assert _listing(out.parent) == before
    assert not out.with_name(out.name + ".partial").exists()
    return error


def text(root: Path, **changes: Any) -> dict[str, Any]:
    return {"data": str(root / "text.txt"), "sequence_length": 32, "batch_size": 2, **changes}
