"""Studies: search a space of settings for those that suit a user's model, budget and constraints"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.study.read import load_studies
    from secateur.study.run import run_study
    from secateur.study.status import study_status

_HOMES = {
    "load_studies": "secateur.study.read",
    "run_study": "secateur.study.run",
    "study_status": "secateur.study.status",
}

__all__ = ["load_studies", "run_study", "study_status"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that reading a study file costs no torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'secateur.study' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
