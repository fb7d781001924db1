"""What llama.cpp makes of a .gguf file: tokens, log-probabilities, speed. It runs in the wheel ``xllamacpp``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from secateur.measure.compare import Worker

PACKAGE = "xllamacpp"
INSTALL = "pip install 'secateur[gguf]'"


def is_installed() -> bool:
    """Whether llama.cpp can be run here; nothing is imported."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp(Worker):
    """A fresh process that opens a file in llama.cpp (``llama_worker.py``): a fault in it does not end ours."""

    def __init__(self, file: Path, *, context: int, threads: int, exact: bool) -> None:
        """
        Args:
            context: most tokens of a text and what follows it.
            exact: for comparing numbers, not for timing: the cache is kept in float32.
        """
        super().__init__(file)
        script = Path(__file__).with_name("llama_worker.py")
        self._command = [sys.executable, "-P", str(script), str(file), "--context", str(context)]
        self._command += ["--threads", str(threads), *(["--exact"] if exact else [])]
