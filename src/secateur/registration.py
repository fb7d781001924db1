"""Tells transformers about the layers of converted models once it is there, so that ``import secateur`` costs no torch.

A converted folder is of model type ``secateur``, which only a process with secateur in it can open: without it the
loader says so, instead of making up the weights of layers that it does not know. Two modules register themselves when
they are imported; they are imported as soon as the part of transformers that they register with is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FOLLOWERS = {
    "transformers.models.auto.configuration_auto": "secateur.runtime.config",
    "transformers.quantizers.auto": "secateur.runtime.quantizer",
}
"""Module of transformers -> our module that registers with it."""


class _Following(Loader):
    """Loads a module as its own loader does, then the one that follows it."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self._loader = loader
        self._follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._follower)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it lets the others find a module that is waited for, and sees it loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FOLLOWERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if found is not None and found.loader is not None:
            found.loader = _Following(found.loader, FOLLOWERS[fullname])
        return found


def register() -> None:
    """Register with what is loaded of transformers now, and with the rest when it is loaded. Again does no harm."""
    for leader, follower in FOLLOWERS.items():
        if leader in sys.modules:
            importlib.import_module(follower)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
