"""How fast models read single texts, one at a time or in batches, measured in turn in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.measure.compare import Worker, fit_together
from secateur.measure.energy import Meter
from secateur.progress import Reporter

ROUNDS = 6


@dataclass
class Reading:
    """What one model did in every round, at one size of batches."""

    per_second: list[float] = field(default_factory=list)
    """Sentences."""
    joules_per_thousand: list[float] = field(default_factory=list)
    """Energy of the whole machine while a thousand sentences are read; empty without a meter."""


def measure_sentences(
    folders: Sequence[Path],
    texts: Sequence[Sequence[int]],
    *,
    padding: int,
    batches: Sequence[int],
    rounds: int = ROUNDS,
    device: str = "cpu",
    threads: int | None = None,
    meter: Meter | None = None,
    reporter: Reporter | None = None,
) -> list[dict[int, Reading]]:
    """Speed of all folders, in their order and by size of batches: A B A B.

    In every round each model reads all texts once, one model straight after the other; a round that warms up is not
    counted. When memory is too small for all at once, each is loaded anew for its turn.

    Args:
        texts: token ids of each; they are read in their order, those of a batch padded to its longest.

    Raises:
        RunError: when one of the processes fails.
    """
    reporter = reporter or Reporter()
    given = {"texts": [list(one) for one in texts], "padding": padding}
    found = [{batch: Reading() for batch in batches} for _ in folders]
    reporter.stage("measuring speed", rounds * len(batches))
    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        if fit_together(folders):
            workers = [stack.enter_context(Worker(one, device=device, threads=threads)) for one in folders]
        for batch in batches:
            for worker in workers:
                worker.ask("read", **given, batch=batch)
            for _ in range(rounds):
                for index, folder in enumerate(folders):
                    with contextlib.ExitStack() as own:
                        if workers:
                            worker = workers[index]
                        else:
                            worker = own.enter_context(Worker(folder, device=device, threads=threads))
                            worker.ask("read", **given, batch=batch)
                        if meter is not None:
                            meter.start()
                        answer = worker.ask("read", **given, batch=batch)
                        if meter is not None:
                            each = 1000 * meter.joules() / answer["texts"]
                            found[index][batch].joules_per_thousand.append(each)
                    found[index][batch].per_second.append(answer["texts"] / answer["seconds"])
                reporter.advance()
    return found
