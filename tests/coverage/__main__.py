"""Makes the rows of docs/coverage.md: every family in a process of its own, under a limit of time and memory.

    python -m tests.coverage [--only causal/llama,image/vit] [--again] [--failing attention] [--attention]

Rows go to benchmarks/results/coverage.json as they are made; `python docs/generate.py` writes the table from it.
Without flags only the families that have no row yet are surveyed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
SECONDS = 60
"""Of processor time."""
MEMORY = 6 * 2**30


def read() -> dict[str, Any]:
    """The rows there are, by key."""
    if not RESULTS.is_file():
        return {}
    rows: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
    return rows


def write(rows: dict[str, Any], order: list[str]) -> None:
    """Write all rows, one a line, in the order of the families."""
    import torch
    import transformers

    head = {
        "name": "coverage",
        "command": "make coverage",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(rows[key])}" for key in order if key in rows]
    text = json.dumps(head, indent=1)[:-2] + ',\n "families": {\n' + ",\n".join(lines) + "\n }\n}\n"
    RESULTS.write_text(text, encoding="utf-8")


def surveyed(family: Any, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row of one family, from a process of its own.

    Args:
        known: a row of which all but the attention is taken over.
    """
    from tests.coverage.survey import survey

    base = {"kind": family.kind, "family": family.model_type, "class": family.class_name, "built": False}
    with tempfile.TemporaryDirectory(prefix="coverage-") as scratch:
        answer = Path(scratch) / "row.json"
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                work = Path(scratch) / "work"
                work.mkdir()
                answer.write_text(json.dumps(survey(family, work, known=known)))
            except BaseException as error:  # noqa: BLE001 - the parent must hear of it
                answer.write_text(json.dumps({**base, "why": f"crash, {type(error).__name__}: {error}"[:300]}))
            finally:
                os._exit(0)
        late = time.monotonic() + 20 * SECONDS  # for one that sleeps
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > late:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {**base, "why": f"did not end within {20 * SECONDS} seconds"}
            time.sleep(0.02)
        if not answer.is_file():
            return {**base, "why": f"the process died, or took more than {SECONDS} seconds of processor time"}
        row: dict[str, Any] = json.loads(answer.read_text())
        return row


def main() -> None:
    """Survey what was asked for, and write after every family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="keys, or globs of keys, divided by commas")
    parser.add_argument("--failing", default="", help="only rows in which this column failed")
    parser.add_argument("--again", action="store_true", help="all families, whatever rows there are")
    parser.add_argument("--attention", action="store_true", help="only that column, the rest as it was")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    import secateur.verbs.prune  # noqa: F401 - loaded once, for all children
    from tests.coverage.families import families

    torch.set_num_threads(1)
    gc.freeze()  # the children need not look through what is loaded here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    every = families()
    rows = read()
    only = [pattern for pattern in asked.only.split(",") if pattern]
    chosen = [one for one in every if any(fnmatch.fnmatch(one.key, pattern) for pattern in only)] if only else every
    if asked.failing:
        chosen = [one for one in chosen if not rows.get(one.key, {}).get(asked.failing, {"ok": True})["ok"]]
    elif not only and not asked.again:
        chosen = [one for one in chosen if one.key not in rows]
    random.Random(0).shuffle(chosen)  # so that what a stopped run leaves is a fair sample
    for number, family in enumerate(chosen):
        started = time.monotonic()
        row = surveyed(family, rows.get(family.key) if asked.attention else None)
        rows[family.key] = row
        write(rows, [one.key for one in every])
        marks = "".join(
            "!" if cell.get("silent") else "+" if cell["ok"] else "-" for cell in row.values() if isinstance(cell, dict)
        )
        print(
            f"{number + 1}/{len(chosen)} {family.key} {marks or row.get('why')} {time.monotonic() - started:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
