"""Time and memory of solving one matrix, by every one-shot method, against the size of the matrix.

Normal weights (outputs x inputs) are pruned to 50 % unstructured by the method with its default options, in a process
of its own; nothing is read or written. The Gram matrix is that of twice as many normal tokens as there are inputs, so
its condition is about 34; collecting it does not count, factorising it does. "refit" is the least squares on the mask
of magnitude that `--refit` puts behind a method; methods are without it (alps has steps of its own). Seconds are the
median of up to five runs that begin within ten seconds. The peak is all that was resident at any time, Python and torch
with it; "of what is given" is what it rose above the start of the work, by the bytes of the weights and, where the
method takes one, the Gram matrix, in float32, which alone make 1.

    python benchmarks/solver_size.py [--sizes 256x256,4096x11008] [--methods wanda,refit] [--threads 1]

Rows that the result file has are kept and not run again, so an interrupted run goes on where it was. That takes the
same machine, versions and threads; otherwise remove the file first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import _common

NAME = "solver_size"
SIZES = "256x256,512x512,1024x1024,2048x2048,4096x4096,4096x11008"
"""Outputs x inputs; the last is the widest matrix of a 7B Llama."""
REFIT = "refit"
RUNS, SECONDS = 5, 10.0
SPARSITY = 0.5
CHUNK = 1024
"""Tokens that are there at a time."""
SAME = ("processor", "cores", "threads", "python", "torch")
"""What rows in one file have in common."""


def main() -> None:
    from secateur.plugins import available

    known = [*available("methods"), REFIT]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--methods", default=",".join(known))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "OUTPUTS", "INPUTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), int(options.one[2]))))
        return
    methods, sizes = options.methods.split(","), [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    if unknown := [name for name in methods if name not in known]:
        raise SystemExit(f"no such method: {', '.join(unknown)}; there are {', '.join(known)}")
    rows = finished(options.threads)
    done = {(row["method"], row["outputs"], row["inputs"]) for row in rows}
    for outputs, inputs in sizes:
        for method in methods:
            if (method, outputs, inputs) not in done:
                rows.append(row_of(method, outputs, inputs, options.threads))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                rows.sort(key=lambda row: (row["outputs"] * row["inputs"], known.index(row["method"])))
                with contextlib.redirect_stdout(io.StringIO()):
                    store(rows, options.threads)
    store(rows, options.threads)


def finished(threads: int) -> list[dict[str, Any]]:
    """Rows of the result file.

    Raises:
        SystemExit: when they were measured elsewhere or otherwise.
    """
    path = _common.RESULTS / f"{NAME}.json"
    if not path.is_file():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    here = machine(threads)
    if differing := [key for key in SAME if data["machine"].get(key) != here[key]]:
        raise SystemExit(f"{path} was measured with other {', '.join(differing)}: remove it to measure anew")
    return list(data["rows"])


def machine(threads: int) -> dict[str, Any]:
    """This machine, with the threads of the processes that solve."""
    return {**_common.machine(), "threads": threads}


def store(rows: list[dict[str, Any]], threads: int) -> None:
    protocol = " ".join(__doc__.split("\n\n")[1].split())
    _common.store(NAME, protocol, rows, machine=machine(threads))


def row_of(method: str, outputs: int, inputs: int, threads: int) -> dict[str, Any]:
    """Measured in a process of its own, which tells of itself: the kernel would count what this one holds as well."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", method, str(outputs), str(inputs)]
    number = str(threads)
    run = _common.run(command, OMP_NUM_THREADS=number, MKL_NUM_THREADS=number)
    found = json.loads(run.stdout.splitlines()[-1])
    return {"method": method, "outputs": outputs, "inputs": inputs, **found}


def measure(method: str, outputs: int, inputs: int) -> dict[str, Any]:
    """One row, in this process."""
    from secateur.plugins import make_method

    solver = make_method("magnitude" if method == REFIT else method)
    kind = "gram" if method == REFIT else solver.statistics
    once(method, solver, kind, 32, 32)  # libraries are loaded when they are first used
    before = resident_bytes()
    seconds: list[float] = []
    while len(seconds) < RUNS and (not seconds or sum(seconds) < SECONDS):
        seconds.append(once(method, solver, kind, outputs, inputs))
    peak = peak_bytes()
    return {
        "seconds": statistics.median(seconds),
        "runs": len(seconds),
        "peak MB": peak / 1e6,
        "of what is given": (peak - before) / (4 * (outputs * inputs + (inputs * inputs if kind == "gram" else 0))),
    }


def once(method: str, solver: Any, kind: str, outputs: int, inputs: int) -> float:
    """Seconds to solve one matrix. The statistics are made anew: they keep a factor for matrices that share them."""
    import torch

    from secateur.plugins import Target
    from secateur.refit import refit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    stats = collected(inputs, kind)
    started = time.perf_counter()
    solved = solver.solve(weight, stats, Target(SPARSITY), generator=generator)
    if method == REFIT:
        started = time.perf_counter()
        refit(weight, solved.weight, solved.mask, stats.gram, stats.dead())
    seconds = time.perf_counter() - started
    zeros = int((~solved.mask).sum())
    assert zeros == round(SPARSITY * weight.numel()), f"{method} made {zeros} zeros"
    return seconds


def collected(inputs: int, kind: str) -> Any:
    """Statistics of twice as many normal tokens as there are inputs, a few at a time; None where none are wanted."""
    if kind == "none":
        return None
    import torch

    from secateur.statistics import InputStatistics

    generator = torch.Generator().manual_seed(1)
    stats = InputStatistics(inputs, "gram" if kind == "gram" else "norms")
    for start in range(0, 2 * inputs, CHUNK):
        stats.update(torch.randn(min(CHUNK, 2 * inputs - start), inputs, generator=generator))
    assert (stats.gram is None) == (kind != "gram")  # it is read once, so that it is whole before the clock runs
    return stats


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that it ever was. Linux keeps two counts: one of them begins with what the parent held."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
