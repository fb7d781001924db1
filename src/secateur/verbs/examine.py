"""The pruned models of folders beside their dense ones, run on one text: which tokens lose, and what breaks.

In float32, one window at a time, one model in memory at a time: first the pruned ones, then the dense one, which is
asked what its losses were if its states had the lengths of theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from secateur.checkpoint.check import check_model_folder, hash_folder
from secateur.checkpoint.source import Source, open_source
from secateur.corpus.load import Text
from secateur.corpus.windows import windows
from secateur.errors import CalibrationError, SecateurError, SourceError, UnsupportedModelError
from secateur.measure.breakage import CLEAN, Window, conditions, distributions, most_broken, sentences
from secateur.measure.corruptions import CORRUPTIONS, corrupt
from secateur.measure.model import load_model
from secateur.measure.token_losses import by_frequency, by_position, frequency_ranks
from secateur.measure.token_states import StateReader, TokenStates
from secateur.progress import Reporter
from secateur.report_result import Continued, Examined
from secateur.verbs.calibration import load_tokenizer, maximum_length
from secateur.verbs.generate import generate

NEW_TOKENS = 40
LENGTH = 512
SAMPLES = 4
"""Windows of the clean text; the first `DAMAGED` of them are also damaged in every way."""
DAMAGED = 2


@dataclass(frozen=True)
class Pruned:
    """A folder to be looked at, and what its result file says of its source."""

    name: str
    folder: Path
    source: Mapping[str, Any]


@dataclass
class _Seen:
    """What one model made of every window, and of every prompt."""

    linear: bool
    states: list[TokenStates]
    continued: list[str]
    shortened: list[list[torch.Tensor]] = field(default_factory=list)
    """For each window, losses at the lengths of each pruned model."""


@dataclass
class _Task:
    """What every model of one source is given."""

    title: str
    tokenizer: Any
    ranks: torch.Tensor
    cuts: list[tuple[str, int, torch.Tensor]]
    """(condition, number of the clean window, token ids)."""
    told: str
    prompts: Sequence[str]
    device: str
    reporter: Reporter


def examine(
    models: Sequence[Pruned], text: Text, *, prompts: Sequence[str], length: int | None, samples: int | None,
    device: str, reporter: Reporter,
) -> list[Examined]:  # fmt: skip
    """Run all models of all sources. What cannot be run is in the result with the reason.

    Args:
        length: tokens in a window; None is `LENGTH`, or what the models take.
        samples: windows; None is `SAMPLES`, or what the text has.
    """
    groups: dict[str, list[Pruned]] = {}
    for model in models:
        groups.setdefault(str(model.source.get("sha256") or model.source.get("model")), []).append(model)
    found: dict[str, Examined] = {}
    for group in groups.values():
        title = str(group[0].source.get("name") or group[0].source.get("model") or "dense")
        for one in group:
            found[one.name] = Examined(one.name, title)
        try:
            source = _find_source(group[0].source, reporter)
            _examine_group(group, found, source, title, text, prompts, length, samples, device, reporter)
        except SecateurError as error:
            for one in group:
                found[one.name].skipped = found[one.name].skipped or error.message
    for examined in found.values():
        if examined.skipped:
            reporter.warn(f"{examined.model} was not run: {examined.skipped}")
    return [found[model.name] for model in models]


def _find_source(recorded: Mapping[str, Any], reporter: Reporter) -> Source:
    """The dense model that a result file names.

    Raises:
        SourceError: when it is not there, or not any more what it was.
    """
    name = str(recorded.get("model") or "")
    if not name:
        raise SourceError("its dense model was one in memory, so its secateur.json can name no folder")
    revision = recorded.get("revision")
    if recorded.get("kind") == "hub" and revision and "@" not in name:
        name = f"{name}@{revision}"
    source = open_source(name, reporter=reporter)
    if recorded.get("sha256") not in (None, "", hash_folder(source.folder)):
        raise SourceError(f"its dense model {name} is not any more what was pruned: the weights differ")
    return source


def _examine_group(
    group: Sequence[Pruned], found: Mapping[str, Examined], source: Source, title: str, text: Text,
    prompts: Sequence[str], length: int | None, samples: int | None, device: str, reporter: Reporter,
) -> None:  # fmt: skip
    task: _Task | None = None
    seen: list[tuple[Pruned, _Seen]] = []
    for one in group:
        try:
            check_model_folder(one.folder, packed=True)
            opened = _load(one.folder, device)
            if task is None:
                tokenizer = load_tokenizer(source.folder)
                task = _prepare(title, tokenizer, opened, text, prompts, length, samples, device, reporter)
            if load_tokenizer(one.folder).get_vocab() != task.tokenizer.get_vocab():
                raise SourceError("it has another tokenizer than its dense model")
            seen.append((one, _run(opened, one.name, task, [])))
        except SecateurError as error:
            found[one.name].skipped = error.message
        finally:
            opened = None
            gc.collect()
    if task is None or not seen:
        return
    lengths = [[states.length for states in each.states] for _, each in seen]
    opened = _load(source.folder, device)
    dense = _run(opened, f"{title} (dense)", task, lengths)
    for number, (one, each) in enumerate(seen):
        _compare(found[one.name], task, dense, each, number)


def _load(folder: Path, device: str) -> Any:
    """In float32, where that fits in memory.

    Raises:
        SourceError: when it does not.
    """
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = (folder / "config.json").read_text(encoding="utf-8")
    wide = nbytes if '"float32"' in config else 2 * nbytes
    free = psutil.virtual_memory().available
    if device in ("auto", "cpu") and not torch.cuda.is_available() and 1.3 * wide > free:
        raise SourceError(f"it takes {wide / 1e9:,.1f} GB in float32, and {free / 1e9:,.1f} GB of memory are free")
    return load_model(folder, device=device, dtype="float32")


def _prepare(
    title: str, tokenizer: Any, model: Any, text: Text, prompts: Sequence[str], length: int | None,
    samples: int | None, device: str, reporter: Reporter,
) -> _Task:  # fmt: skip
    """Cut the text, and damage it.

    Raises:
        CalibrationError: when the text is too short.
    """
    reader = StateReader(model)  # refuses what has no next tokens before the text is read
    longest = maximum_length(model)
    length = min(length or LENGTH, longest or LENGTH)
    whole = windows(text.text, tokenizer, 1).view(-1)
    if length > len(whole) and samples is None:
        length = len(whole)
    if length < 2:
        raise CalibrationError("the text is too short: one token predicts nothing", hint="give a longer text")
    cut = windows(text.text, tokenizer, length, samples)[: samples or SAMPLES]
    cuts = [(CLEAN, part, window) for part, window in enumerate(cut)]
    for name in CORRUPTIONS:
        for part, window in enumerate(cut[:DAMAGED]):
            damaged = corrupt(tokenizer.decode(window, clean_up_tokenization_spaces=False), name, part=part)
            ids = tokenizer(damaged, add_special_tokens=False)["input_ids"][:length]
            if len(ids) > 1:
                cuts.append((name, part, torch.tensor(ids, dtype=torch.int64)))
    if any(int(window.max()) >= reader.vocabulary for _, _, window in cuts):
        raise CalibrationError("the tokenizer makes tokens that the model does not have")
    told = (
        f"{text.origin}; the first {len(cut)} windows of {length:,} tokens that do not overlap, no special tokens, "
        f"float32; the first {len(cut[:DAMAGED])} of them damaged in {len(CORRUPTIONS)} ways; ranks are by count in "
        f"the whole text of {len(whole):,} tokens"
    )
    return _Task(title, tokenizer, frequency_ranks(whole, reader.vocabulary), cuts, told, prompts, device, reporter)


def _run(model: Any, name: str, task: _Task, lengths: Sequence[Sequence[torch.Tensor]]) -> _Seen:
    """All windows and prompts through one model.

    Args:
        lengths: for each pruned model, for each window, the lengths of its states.
    """
    reader = StateReader(model)
    found = _Seen(reader.linear, [], [])
    task.reporter.stage(f"reading {name}", len(task.cuts) + len(task.prompts))
    for number, (_, _, window) in enumerate(task.cuts):
        states, shortened = reader(window, [each[number] for each in lengths] if reader.linear else [])
        found.states.append(states)
        found.shortened.append(shortened)
        task.reporter.advance()
    for prompt in task.prompts:
        try:
            found.continued.append(generate(model, prompt, tokenizer=task.tokenizer, new_tokens=NEW_TOKENS))
        except UnsupportedModelError:
            break
        task.reporter.advance()
    return found


def _compare(result: Examined, task: _Task, dense: _Seen, pruned: _Seen, number: int) -> None:
    """Enter everything that the two models of a pair have shown."""
    linear = dense.linear and pruned.linear
    pairs = [
        Window(condition, part, window, a, b, shortened[number] if linear else None)
        for (condition, part, window), a, b, shortened in zip(
            task.cuts, dense.states, pruned.states, dense.shortened, strict=True
        )
    ]
    clean = [pair for pair in pairs if pair.condition == CLEAN]
    own, other = torch.cat([pair.dense.loss for pair in clean]), torch.cat([pair.pruned.loss for pair in clean])
    tokens = torch.cat([pair.dense.tokens for pair in clean])
    positions = torch.cat([torch.arange(1, len(pair.dense) + 1) for pair in clean])
    result.text = task.told
    result.by_frequency = by_frequency(own, other, task.ranks[tokens])
    result.by_position = by_position(own, other, positions)
    result.conditions = conditions(pairs)
    for condition in result.conditions:
        result.distributions += distributions(pairs, condition.name)
    result.broken = most_broken(pairs, lambda ids: str(task.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    result.why = sentences(result.conditions, result.distributions)
    result.continued = [
        Continued(prompt, a, b) for prompt, a, b in zip(task.prompts, dense.continued, pruned.continued, strict=False)
    ]
