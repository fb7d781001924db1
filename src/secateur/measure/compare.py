"""Two model folders side by side, each in a process of its own, measured in turn: A B A B.

Load, heat and neighbours change the speed of a machine by the minute; two measurements one after the other see the same
machine, so the ratio inside each round is worth more than the ratio of two averages.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from secateur.errors import RunError
from secateur.measure.energy import Meter
from secateur.progress import Reporter

# Two processes with the very same file differ by some per cent, for good, by where their weights lie in memory.
PLACEMENT_NOISE = 0.03

RESIDENT = (
    "resident memory of a fresh process after it ran, on an accelerator what PyTorch has allocated there, less what it "
    "was before the weights were loaded"
)
"""How memory is measured, in words."""

_QUIT_SECONDS = 5


class Worker:
    """A fresh process that opens a folder with the stock classes (``worker.py``); use it in a ``with`` statement."""

    def __init__(
        self, folder: str | Path, dtype: str = "auto", *, device: str = "cpu", threads: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            dtype: number format the weights are loaded in; auto is the file's.
            threads: CPU threads; None leaves the choice to torch.
            environment: variables that the process has besides those of this one.
        """
        self._environment = dict(environment or {})
        self.folder = Path(folder)
        self._command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(self.folder)]
        self._command += ["--dtype", dtype, "--device", device, "--threads", str(threads or 0)]
        self._process: subprocess.Popen[str] | None = None
        self._chatter = contextlib.ExitStack()

    def __enter__(self) -> Self:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **self._environment,
        }
        self._stderr = self._chatter.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is not None:
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # a dead child has closed the pipe
                    process.stdin.close()  # the end of requests lets the child leave by itself
            try:
                process.wait(timeout=_QUIT_SECONDS if kind is None else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
            self._process = None
        self._chatter.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; see ``worker.py`` for the operations.

        Raises:
            RunError: when the process refuses or dies; the message has its reason, the hint the end of its stderr.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("a Worker answers inside its with statement only")
        with contextlib.suppress(OSError):  # it died: reading below finds out
            process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise RunError(f"the process that opened {self.folder} ended with {how} during '{op}'", hint=self._tail())
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise RunError(f"{self.folder}: '{op}' failed: {answer['type']}: {answer['error']}", hint=self._tail())
        return answer

    def _tail(self, lines: int = 4) -> str:
        self._stderr.seek(0)
        kept = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        return "its last words: " + " | ".join(kept[-lines:]) if kept else ""


@dataclass
class Ratio:
    """Median of the per-round ratios after/before, with an interval that holds the true median.

    The interval lies between two order statistics (sign test), so it needs no assumption about the noise.
    ``coverage`` is how sure it is; under six rounds that is less than 0.95.
    """

    median: float
    low: float
    high: float
    coverage: float

    @property
    def differs(self) -> bool:
        """Whether the difference is beyond noise: the interval, and the placement of memory."""
        return self.low > 1 + PLACEMENT_NOISE or self.high < 1 - PLACEMENT_NOISE


@dataclass
class Side:
    """One of the two models."""

    bytes_resident: int
    """What the loaded model adds to the memory of its process, after it has run."""
    decode_tokens_per_second: float | None
    """Median over the rounds; None for a model that does not decode."""
    rounds: list[float] = field(default_factory=list)
    joules_per_token: list[float] = field(default_factory=list)
    """Energy of the whole machine in every round, by the tokens of prompt and continuation; empty without a meter."""
    continuation: str | None = None


@dataclass
class Pair:
    """Both models and the ratio of their decoding speeds (after / before)."""

    before: Side
    after: Side
    decode_ratio: Ratio | None
    protocol: dict[str, Any]


def interval_of_ratios(before: Sequence[float], after: Sequence[float], coverage: float = 0.95) -> Ratio:
    """Compare paired rounds: the narrowest interval of order statistics that covers the median as asked, or the widest.

    Raises:
        ValueError: unless both have the same number of rounds, at least one.
    """
    ratios = sorted(b / a for a, b in zip(before, after, strict=True))
    count = len(ratios)
    if not count:
        raise ValueError("no rounds")
    reached = 0.0
    for cut in range(count // 2, -1, -1):
        # The median lies outside the interval when at most `cut` of the ratios fall on one side of it.
        outside = 2 * sum(math.comb(count, k) for k in range(cut + 1)) / 2**count
        reached = max(0.0, 1 - outside)
        if reached >= coverage or cut == 0:
            return Ratio(statistics.median(ratios), ratios[cut], ratios[count - 1 - cut], reached)
    raise AssertionError("unreachable: cut 0 always returns")


def measure_pair(
    before: str | Path,
    after: str | Path,
    *,
    prompt_tokens: Sequence[int] = (),
    prompt: str | None = None,
    new_tokens: int = 32,
    rounds: int = 6,
    continuation_tokens: int = 40,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    meter: Meter | None = None,
    reporter: Reporter | None = None,
) -> Pair:
    """Resident memory, decoding speed and energy, and a continuation of two folders.

    Each round decodes ``new_tokens`` greedily after ``prompt_tokens`` in both models, one straight after the other; a
    round that warms up is not counted. When memory is too small for both models at once, each is loaded anew for its
    turn.

    Args:
        prompt_tokens: empty for models that do not decode; only memory is measured then.
        prompt: when given, both continue this text by ``continuation_tokens`` tokens.

    Raises:
        RunError: when one of the processes fails.
    """
    reporter = reporter or Reporter()
    folders = (Path(before), Path(after))
    reporter.stage("measuring memory and speed", len(folders) + (rounds if prompt_tokens else 0))
    speeds: tuple[list[float], list[float]] = ([], [])
    sides: list[Side] = []
    request = {"prompt_tokens": list(prompt_tokens), "new_tokens": new_tokens}
    together = fit_together(folders)

    def open_one(folder: Path) -> Worker:
        return Worker(folder, dtype, device=device, threads=threads)

    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        for title, folder in zip(("before", "after"), folders, strict=True):
            with contextlib.ExitStack() as own:
                worker = own.enter_context(open_one(folder))
                sides.append(_first_look(worker, request if prompt_tokens else None, prompt, continuation_tokens))
                if together:
                    workers.append(worker)
                    stack.push(own.pop_all())
            reporter.advance(title)
        for _ in range(rounds if prompt_tokens else 0):
            for index, folder in enumerate(folders):
                with contextlib.ExitStack() as own:
                    if together:
                        worker = workers[index]
                    else:
                        worker = own.enter_context(open_one(folder))
                        worker.ask("decode", prompt_tokens=list(prompt_tokens), new_tokens=2)  # warm up
                    answer, joules = metered(worker, request, meter)
                    sides[index].joules_per_token += [] if joules is None else [joules]
                speeds[index].append(answer["tokens"] / answer["seconds"])
            reporter.advance()
    ratio = None
    if prompt_tokens:
        for side, speed in zip(sides, speeds, strict=True):
            side.rounds, side.decode_tokens_per_second = speed, statistics.median(speed)
        ratio = interval_of_ratios(*speeds)
    protocol = {
        "decode": f"greedy, key-value cache, batch 1, {new_tokens} tokens after a prompt of {len(prompt_tokens)}; "
        f"median of {rounds} rounds, before and after in turn",
        "resident": RESIDENT,
        "dtype": dtype,
        "device": device,
        "both_in_memory": together,
    }
    return Pair(sides[0], sides[1], ratio, protocol)


def metered(worker: Worker, request: dict[str, Any], meter: Meter | None) -> tuple[dict[str, Any], float | None]:
    """What decoding gave, and the energy of a token of prompt and continuation in joules; None without a meter."""
    if meter is None:
        return worker.ask("decode", **request), None
    meter.start()
    answer = worker.ask("decode", **request)
    return answer, meter.joules() / (len(request["prompt_tokens"]) + request["new_tokens"])


def _first_look(worker: Worker, request: dict[str, Any] | None, prompt: str | None, continuation_tokens: int) -> Side:
    """Load, warm up, and read the memory: weights that are mapped from a file count only once they were used."""
    worker.ask("load")
    if request:
        worker.ask("decode", **request)
    memory = worker.ask("resident")
    side = Side(memory["bytes_resident"] - memory["bytes_resident_before"], None)
    if prompt is not None and request:
        side.continuation = worker.ask("continue", prompt=prompt, new_tokens=continuation_tokens)["text"]
    return side


def fit_together(folders: Sequence[Path]) -> bool:
    """Whether models fit in the free memory at once, with a margin for activations and number formats."""
    import psutil

    needed = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return bool(2.5 * needed + 2e9 < psutil.virtual_memory().available)
