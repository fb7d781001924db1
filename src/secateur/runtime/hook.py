"""Tells transformers of our formats in the moment in which it is imported: ``import secateur`` stays light.

transformers has registries of ways to store weights and of types of configs, and no entry points for them. Our modules
that register themselves follow the modules that hold the registries: where one of these is there already, ours is
imported at once. Otherwise a finder in `sys.meta_path` waits for its import, lets that go on as ever, and has ours
imported when it is done. It looks at no other module, and takes itself away after the last one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

FOLLOWERS: Mapping[str, Sequence[str]] = {
    "transformers.models.auto.configuration_auto": ("secateur.layers.config",),
    "transformers.quantizers.auto": ("secateur.runtime.quantizer", "secateur.layers.loader"),
}
"""Module of transformers -> ours that register with it when they are imported."""


class _Finder(MetaPathFinder):
    """Finds the modules that are waited for, as the finders behind it do, and has them loaded by `_Loader`."""

    def __init__(self, waiting: Sequence[str]) -> None:
        self._waiting = set(waiting)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)  # comes by here once more, and is not waited for any longer
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads by another loader, then has the followers imported."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as it would be without us.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _follow(module.__name__)


def install() -> None:
    """Register with what is there of transformers now, with the rest when it comes. Calling it again does nothing."""
    for name in FOLLOWERS:
        if name in sys.modules:
            _follow(name)
    waiting = [name for name in FOLLOWERS if name not in sys.modules]
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _follow(name: str) -> None:
    for follower in FOLLOWERS[name]:
        importlib.import_module(follower)
