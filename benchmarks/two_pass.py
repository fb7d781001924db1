"""Wanda with a pattern: secateur against the paper's procedure, plainly written, on the same calibration texts.

Both prune the demo model to 2:4 by the first 32 windows of 1,024 tokens of parts of the validation text (the first of
six parts begins where the reference protocol begins). "plain" is the published procedure in some forty lines on the
stock model, float32, two forwards through each block; "default" is what `secateur prune --method wanda --pattern 2:4`
does; "one forward" is `--method-option passes=1`, each matrix seeing what its pruned predecessors make. Perplexity is
that of `quality.py`; "against plain" is the mean over the texts of the log of the ratio, with its standard error.

    SECATEUR_DATA=folder python benchmarks/two_pass.py [--parts 3] [--log FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common
import _reference
import torch
import transformers

from secateur.checkpoint.source import open_source

METHOD = "wanda 2:4"
WAYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "one forward": ("--method-option", "passes=1"),
    "one forward, float32": ("--method-option", "passes=1", "--compute-dtype", "float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=3, choices=range(1, 7), help="how many of the six parts")
    parser.add_argument("--log", type=Path, help="append every perplexity to this file, and take finished ones from it")
    options = parser.parse_args()
    data = _common.data_folder()
    found: dict[str, list[float]] = {"plain": [], **{way: [] for way in WAYS}}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for text in _reference.parts(data, 6, Path(scratch))[: options.parts]:
            prunes: dict[str, Any] = {"plain": functools.partial(two_pass_wanda, text, out, "2:4")}
            for way, more in WAYS.items():
                prunes[way] = functools.partial(_reference.prune, METHOD, out, data, None, calibration=text, more=more)
            for way, prune in prunes.items():
                measure = functools.partial(_perplexity, prune, out, data)
                found[way].append(_logged(options.log, f"{way}, {text.name}", measure))
    rows: list[dict[str, Any]] = []
    for way, values in found.items():
        row: dict[str, Any] = {"way": way, "perplexity": ", ".join(f"{value:.1f}" for value in values)}
        row["geometric mean"] = statistics.geometric_mean(values)
        if way != "plain":
            changes = [math.log(a / b) for a, b in zip(values, found["plain"], strict=True)]
            row["against plain"] = f"{math.expm1(statistics.mean(changes)):+.1%}"
            error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
            row["standard error"] = f"{error:.1%}"
        rows.append(row)
    _common.store("two_pass", " ".join(__doc__.split("\n\n")[1].split()), rows)


def two_pass_wanda(text: Path, out: Path, pattern: str) -> None:
    """The published procedure, written plainly: one pass for the statistics of the dense block, one with it pruned."""
    folder = open_source("demo").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = ids[: _reference.SAMPLES * _reference.LENGTH].reshape(_reference.SAMPLES, 1, _reference.LENGTH)
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def catch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise Stop

    with torch.no_grad():
        hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for window in windows:
            with contextlib.suppress(Stop):
                model(window, use_cache=False)
        hook.remove()
        hidden = [states for states, _ in caught]
        for block in model.model.layers:
            linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
            squares = {linear: torch.zeros(linear.in_features) for linear in linears}

            def add(linear: torch.nn.Linear, args: tuple[torch.Tensor, ...], _: Any) -> None:
                squares[linear] += args[0][0].square().sum(dim=0)  # noqa: B023 - the hook is removed in the same turn

            hooks = [linear.register_forward_hook(add) for linear in linears]
            for states, (_, kwargs) in zip(hidden, caught, strict=True):
                block(states, **kwargs)
            for hook in hooks:
                hook.remove()
            for linear in linears:
                _zero_lowest(linear.weight, linear.weight.abs() * squares[linear].sqrt(), pattern)
            outputs = [block(states, **kwargs) for states, (_, kwargs) in zip(hidden, caught, strict=True)]
            hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _zero_lowest(weight: torch.Tensor, score: torch.Tensor, pattern: str) -> None:
    """Half of every row, or by N:M of every M inputs; sorted, so that the counts are exact."""
    keep, _, group = pattern.partition(":")
    size = int(group) if pattern else weight.shape[1]
    drop = size - int(keep) if pattern else size // 2
    grouped = score.reshape(-1, size)
    lowest = grouped.argsort(dim=1, stable=True)[:, :drop]
    weight.reshape(-1, size).scatter_(1, lowest, 0.0)


def _perplexity(prune: Any, out: Path, data: Path) -> float:
    prune()
    return float(_reference.quality(str(out), data, questions=False)["perplexity"])


def _logged(log: Path | None, key: str, measure: Any) -> float:
    """A measured value, or the one that an earlier run of this script noted under the same key."""
    if log and log.exists():
        for row in map(json.loads, log.read_text().splitlines()):
            if row["key"] == key:
                return float(row["value"])
    value = float(measure())
    print(f"{key}: {value:.2f}", flush=True)
    if log:
        with log.open("a") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
    return value


if __name__ == "__main__":
    main()
