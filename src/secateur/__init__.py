"""Secateur: prune Transformers, and prove the result.

The names below are loaded when they are first used, so that ``import secateur`` costs no torch. It also sees to it that
transformers, once it is imported, opens models in the sparse format (`secateur.runtime.hook`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur.runtime import hook

if TYPE_CHECKING:
    from secateur.criteria.obs import Obs
    from secateur.expert_criteria.reap import Reap
    from secateur.methods.magnitude import Magnitude
    from secateur.methods.random import Random
    from secateur.methods.sparsegpt import SparseGPT
    from secateur.methods.wanda import Wanda
    from secateur.recipe import Override, Recipe
    from secateur.recovery.callback import SparsityCallback
    from secateur.training import Training
    from secateur.verbs.allocate import allocate
    from secateur.verbs.bench import bench
    from secateur.verbs.convert import convert
    from secateur.verbs.evaluate import evaluate
    from secateur.verbs.export import export
    from secateur.verbs.generate import generate
    from secateur.verbs.inspect import inspect
    from secateur.verbs.prune import prune
    from secateur.verbs.recover import recover
    from secateur.verbs.report import report

    __version__: str

_HOMES = {
    "Magnitude": "secateur.methods.magnitude",
    "Obs": "secateur.criteria.obs",
    "Override": "secateur.recipe",
    "Random": "secateur.methods.random",
    "Reap": "secateur.expert_criteria.reap",
    "Recipe": "secateur.recipe",
    "SparseGPT": "secateur.methods.sparsegpt",
    "SparsityCallback": "secateur.recovery.callback",
    "Training": "secateur.training",
    "Wanda": "secateur.methods.wanda",
    "allocate": "secateur.verbs.allocate",
    "bench": "secateur.verbs.bench",
    "convert": "secateur.verbs.convert",
    "evaluate": "secateur.verbs.evaluate",
    "export": "secateur.verbs.export",
    "generate": "secateur.verbs.generate",
    "inspect": "secateur.verbs.inspect",
    "prune": "secateur.verbs.prune",
    "recover": "secateur.verbs.recover",
    "report": "secateur.verbs.report",
}

__all__ = [
    "Magnitude",
    "Obs",
    "Override",
    "Random",
    "Reap",
    "Recipe",
    "SparseGPT",
    "SparsityCallback",
    "Training",
    "Wanda",
    "__version__",
    "allocate",
    "bench",
    "convert",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "prune",
    "recover",
    "report",
]


hook.install()


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562) and keep it."""
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("secateur")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
