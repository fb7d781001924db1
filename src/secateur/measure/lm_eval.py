"""Public task suites, run by the lm-evaluation-harness (extra ``lm-eval``) on a model that is already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import CalibrationError, MissingExtraError, UnknownNameError
from secateur.measure.scoring import NextTokenScorer
from secateur.progress import Reporter

# What a task is usually quoted by, best first; a task without any of these gives its first number.
_METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "f1,none")


@dataclass(frozen=True)
class TaskScore:
    """The main metric of one task. ``stderr`` is None where the suite gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    protocol: str


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch: int = 8,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> list[TaskScore]:
    """Run tasks by their names in the suite.

    Args:
        limit: only the first so many questions of each task.

    Raises:
        MissingExtraError: without lm-eval.
        UnknownNameError: for a task the suite does not have.
        CalibrationError: when a task's data cannot be fetched.
        UnsupportedModelError: for a model without next-token logits.
    """
    reporter = reporter or Reporter()
    NextTokenScorer(model)  # refuses what has no next-token logits, with the reason
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError(
            "--tasks needs the extra 'lm-eval'", hint="run: pip install 'secateur[lm-eval]'"
        ) from None
    manager = TaskManager()
    for name in tasks:
        if name not in manager.all_tasks:
            raise UnknownNameError("task of lm-eval", name, _near(name, manager.all_tasks))
    reporter.stage("public tasks", 1)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        results = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, verbosity="ERROR"
        )
    except (OSError, ConnectionError) as error:  # datasets that are not cached and no network
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"the data of a task cannot be fetched: {reason}", hint="check the network") from None
    reporter.advance(", ".join(tasks))
    version = getattr(lm_eval, "__version__", "")
    shots = results.get("n-shot", {})
    return [
        _main_metric(name, results["results"][name], f"lm-eval {version}, {shots.get(name, 0)}-shot".replace("  ", " "))
        for name in tasks
    ]


def _main_metric(task: str, values: dict[str, Any], protocol: str) -> TaskScore:
    numbers = [
        key for key, value in values.items() if "," in key and "_stderr" not in key and _number(value) is not None
    ]
    if not numbers:
        raise CalibrationError(f"task {task} gives no number")
    metric = next((known for known in _METRICS if known in numbers), numbers[0])
    name, _, variant = metric.partition(",")
    stderr = _number(values.get(f"{name}_stderr,{variant}"))
    return TaskScore(task, name, float(values[metric]), stderr, f"{protocol}, {name}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _near(name: str, known: Sequence[str]) -> list[str]:
    """A handful of the thousands of task names: the nearest, or those of the same family."""
    import difflib

    return difflib.get_close_matches(name, known, n=6, cutoff=0.4) or sorted(known)[:6]
