"""How long it takes until the command line answers.

Whole processes, in turn with `python -c pass`: `import secateur` and `secateur --help`, median of ten runs each.
Neither imports torch; a test sees to that.

    python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import sys

import _common

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import secateur": ["-c", "import secateur"],
    "secateur --help": ["-m", "secateur", "--help"],
    "secateur methods": ["-m", "secateur", "methods"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(10):
        for name, arguments in COMMANDS.items():
            seconds[name].append(_common.run([sys.executable, *arguments]).seconds)
    rows = [
        {"command": name, "seconds": statistics.median(values), "slowest": max(values)}
        for name, values in seconds.items()
    ]
    _common.store("startup", " ".join(__doc__.split("\n\n")[1].split()), rows)


if __name__ == "__main__":
    main()
