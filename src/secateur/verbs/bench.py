"""`secateur bench`: what a model takes beside others: size, memory, speed, energy, operations, quality."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur.bench_result import BenchResult, Quantities, RatioResult
from secateur.checkpoint.file import OutputFile
from secateur.checkpoint.source import open_source
from secateur.corpus.load import load_text
from secateur.engine.device import parse_dtype, resolve_device
from secateur.errors import UsageError
from secateur.measure.compare import RESIDENT, Ratio, interval_of_ratios
from secateur.measure.energy import Carbon, carbon_of, find_meter
from secateur.measure.in_turn import Load, Measurement, measure_in_turn
from secateur.measure.llama_cpp import PACKAGE as LLAMA_CPP
from secateur.measure.llama_cpp import is_installed
from secateur.progress import Recorder, Reporter
from secateur.result import write_json
from secateur.runtime import kernels
from secateur.runtime.ops import TOKENS
from secateur.verbs.bench_entries import INT8, QUALITIES, QUANTISED, Entry, quantised, rounded, source_of, stored
from secateur.verbs.bench_verdict import bench_sentences
from secateur.verbs.memory import as_source
from secateur.verbs.provenance import machine, versions

WINDOWS = 12
"""Windows of the measuring text, when the text has as many."""
SURE = 0.95
"""Coverage of an interval from which a difference may be claimed: six rounds."""
SAME_QUALITY = 0.005
"""Qualities that differ by less are told as the same, however sure the difference is."""
_SIZES = ("parameters", "nonzero", "bytes_disk", "bytes_resident", "flops_per_token", "sparse_flops_per_token")
_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_tokens_per_second_batch_8",
           "seconds_to_first_token", "joules_per_token")  # fmt: skip


def bench(
    model: str | Path | transformers.PreTrainedModel,
    *,
    out: str | Path | None = None,
    against: Sequence[str | Path] = (),
    baselines: bool = False,
    tokenizer: Any = None,
    data: str | Path | None = "builtin",
    sequence_length: int | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    rounds: int = 7,
    region: str | None = None,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Size, memory, speed, energy, operations and quality of a model, beside others in the same run.

    Args:
        model: a folder, hub id, ``.gguf`` file, ``demo``, or a model in memory (with its ``tokenizer``).
        out: ``.json`` file that keeps the result, for `report`; None keeps none.
        against: models it is compared with; each round measures all of them, one after the other.
        baselines: add what a user would otherwise take: the dense model (the first of ``against``, else the one that
            ``secateur.json`` names, else ``model``) in float32, bfloat16 and, in llama.cpp, with 8 and 4 bits; with 8
            bits in torchao where llama.cpp does not know it.
        data: text for the perplexity, see `secateur.corpus.load.load_text`; None leaves it out.
        sequence_length: tokens in a window of it; None is 1024, or what the models can take.
        prompt_tokens: tokens of the prompt before decoding is timed.
        new_tokens: tokens decoded after it.
        rounds: how often each model is timed; fewer than six leave the interval less sure than 95 %.
        region: country whose electricity the carbon dioxide is counted for, three letters.
        threads: CPU threads; None leaves the choice to PyTorch.
        dtype: number format that ``model`` and ``against`` run in; auto is that of their files.
        overwrite: replace an existing OUT.

    Raises:
        UsageError: for arguments that make no sense.
        OutputError: when OUT exists or cannot be written.
        SourceError: when a model cannot be found or opened.
        RunError: when the process that measures ``model`` fails.
    """
    recorder = Recorder(reporter)
    _check(prompt_tokens, new_tokens, rounds, sequence_length, threads, dtype)
    named = [one for one in (model, *against) if isinstance(one, str | Path)]
    file = None if out is None else OutputFile(out, suffix=".json", overwrite=overwrite, sources=named)
    carbon = carbon_of(region) if region is not None else None
    text = None if data is None else load_text(data, "measure")
    where = resolve_device(device)
    with ExitStack() as stack:
        if isinstance(model, transformers.PreTrainedModel):
            first, _ = as_source(model, tokenizer, None, stack)
        else:
            first = open_source(model, reporter=recorder, packed=True)
        others = [open_source(one, reporter=recorder, packed=True) for one in against]
        entries = [stored(str(model) if isinstance(model, str | Path) else first.name, first, dtype)]
        entries += [stored(str(name), one, dtype) for name, one in zip(against, others, strict=True)]
        plain = [entry for entry in entries[1:] if not entry.packed]
        dense = [*plain, *entries[1:], entries[0]][0]
        failed: list[Quantities] = []
        if baselines:
            name, source = (dense.name, dense.source) if plain else source_of(entries[0].name, first, recorder)
            there = {(one.source.folder, one.format) for one in entries}
            added = [stored(name, source, one) for one in ("float32", "bfloat16")]
            entries += [one for one in added if (one.source.folder, one.format) not in there]
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secateur-")))
            made, failed = _quantised(name, source, scratch, recorder)
            entries += made
        for entry in entries:
            entry.look(prompt_tokens, recorder)
            entry.find_kernels(where.type)
        cut = sequence_length or min(1024, *(one.longest for one in entries))
        if text is not None:
            known = entries[0].measure_quality(text, cut, WINDOWS, where, recorder)
            for entry in entries[1:]:
                if entry.cuts_like(entries[0]):
                    entry.measure_quality(text, cut, WINDOWS, where, recorder)
                else:
                    why = "its tokenizer has another vocabulary: loss per token cannot be compared"
                    entry.quantities.missing["perplexity"] = why
                    recorder.note(f"{entry.name} is compared by bits per byte, not by perplexity: {why}")
                    entry.measure_passages(known, where, recorder)
        else:
            for entry in entries:
                entry.quantities.missing |= dict.fromkeys(QUALITIES, "not asked for")
        meter, why = find_meter(where.type)
        count = threads or torch.get_num_threads()
        load = Load(_prompt(entries, text.text if text else None, prompt_tokens, new_tokens), new_tokens)
        measured = measure_in_turn(
            [one.contender(where.type, count, len(load.tokens) + new_tokens) for one in entries], load, rounds=rounds,
            meter=meter, reporter=recorder,
        )  # fmt: skip
        result = _result(
            entries, failed, measured, dense, (why, carbon), recorder,
            {
                "speed": f"greedy, key-value cache; prompt of {len(load.tokens)} tokens, {new_tokens} new ones; batch "
                f"{load.batch}: prompt of {max(1, len(load.tokens) // load.batch)}; median of {rounds} rounds, all "
                "models in turn, each in a process of its own",
                "resident": RESIDENT,
                "energy": meter.source if meter is not None else why,
                "perplexity": entries[0].protocol,
                "operations": entries[0].counted,
                "threads": count, "device": where.type,
                **_packed_protocol(entries),
            },
        )  # fmt: skip
    if file is not None:
        with file:
            write_json(file.partial, result.to_dict())
            file.commit()
    return result


def _check(
    prompt_tokens: int, new_tokens: int, rounds: int, length: int | None, threads: int | None, dtype: str
) -> None:  # fmt: skip
    asked = (("prompt_tokens", prompt_tokens, 8), ("new_tokens", new_tokens, 4), ("rounds", rounds, 1))
    for name, value, least in (*asked, ("sequence_length", length, 2), ("threads", threads, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}", hint=f"it must be at least {least}")
    parse_dtype(dtype, "dtype")


def _quantised(name: str, source: Any, scratch: Path, recorder: Recorder) -> tuple[list[Entry], list[Quantities]]:
    """The dense model as files of llama.cpp, and rows with the reason for those that could not be made.

    Where none could, it is rounded by torchao instead, which runs in transformers.
    """
    made: list[Entry] = []
    failed: list[Quantities] = []

    def take(kind: str, runtime: str, entry: Entry | None, why: str) -> None:
        if entry is not None:
            made.append(entry)
        else:
            failed.append(Quantities(name, runtime, kind, missing={"everything": why}))
            recorder.warn(f"the dense model as {kind} was not measured: {why}")

    for kind in QUANTISED:
        take(kind, "llama.cpp", *(quantised(name, source, kind, scratch, recorder) if is_installed() else (
            None, f"{LLAMA_CPP} is not installed (pip install 'secateur[gguf]')"
        )))  # fmt: skip
    if not made:
        take(INT8, "transformers", *rounded(name, source, scratch, recorder))
    return made, failed


def _prompt(entries: Sequence[Entry], text: str | None, count: int, new_tokens: int) -> list[int]:
    """Tokens that every model knows: of the text, else in the order of the vocabulary."""
    room = min(one.longest for one in entries) - new_tokens
    if room < 8:
        raise UsageError(
            f"{new_tokens} new tokens leave no room for a prompt: the models take {room + new_tokens}",
            hint="give fewer with new_tokens",
        )
    vocabulary = min(one.vocabulary for one in entries)
    tokens = entries[0].tokens_of(text, count) if text else []
    if len(tokens) < count or max(tokens) >= vocabulary:
        tokens = [3 + place % max(1, vocabulary - 3) for place in range(count)]
    return tokens[: min(count, room)]


def _result(
    entries: Sequence[Entry], failed: Sequence[Quantities], measured: Sequence[Measurement], dense: Entry,
    energy: tuple[str, Carbon | None], recorder: Recorder, protocol: dict[str, Any],
) -> BenchResult:  # fmt: skip
    why, carbon = energy
    rows: list[Quantities] = []
    for entry, found in zip(entries, measured, strict=True):
        row = entry.quantities
        row.bytes_resident = found.bytes_resident
        for name in _SPEEDS:
            setattr(row, name, found.median(name))
        row.missing |= found.missing
        if row.joules_per_token is None:
            own = found.missing.get("joules_per_token") or found.missing.get("speed")
            row.missing["joules_per_token"] = why or own or "the meter gave nothing"
        if carbon is None:
            row.missing["grams_co2_per_token"] = "no region was given (--region)"
        elif row.joules_per_token is None:
            row.missing["grams_co2_per_token"] = row.missing["joules_per_token"]
        else:
            row.grams_co2_per_token = row.joules_per_token * carbon.grams_per_joule
        rows.append(row)
    for row in rows:
        row.efficiency = efficiency(row, dense.quantities)
    ratio = {
        row.label: _ratios(rows[0], row, measured[0], found) for row, found in zip(rows[1:], measured[1:], strict=True)
    }
    for row, entry in zip(rows[1:], entries[1:], strict=True):
        if rows[0].perplexity and row.perplexity:
            ratio[row.label]["perplexity"] = quality_ratio(entries[0].by_window, entry.by_window)
        elif entries[0].by_passage and entry.by_passage:
            ratio[row.label]["bits_per_byte"] = _sure(interval_of_ratios(entry.by_passage, entries[0].by_passage))
    result = BenchResult(**vars(rows[0]))
    result.against = [*rows[1:], *failed]
    result.ratio = ratio
    result.verdict = bench_sentences(result)
    result.protocol = {**protocol, **({"carbon": carbon.source} if carbon is not None else {})}
    result.machine = machine()
    result.versions = versions()
    result.warnings = recorder.warnings
    return result


def _packed_protocol(entries: Sequence[Entry]) -> dict[str, str]:
    """How packed weights are multiplied, where any are."""
    packed = [entry.quantities for entry in entries if entry.packed]
    if not packed:
        return {}
    if packed[0].kernels is None:
        return {"packed": f"unpacked each time they are used ({packed[0].missing['kernels']})"}
    return {
        "packed": f"{kernels.told()}, up to {TOKENS} tokens at once; for more, as in a prompt and for the perplexity, "
        "weights are unpacked and activations are not rounded"
    }


def _ratios(ours: Quantities, theirs: Quantities, one: Measurement, other: Measurement) -> dict[str, RatioResult]:
    """Our values by theirs: exact ones as they are, timed ones as medians of the rounds."""
    made: dict[str, RatioResult] = {}
    for name in _SIZES:
        a, b = getattr(ours, name), getattr(theirs, name)
        if a is not None and b:
            exact = a / b
            # Memory is measured as well, if only once; a twentieth of it is the noise of an allocator.
            noise = 0.05 if name == "bytes_resident" else 0.0
            made[name] = RatioResult(exact, exact, exact, 1.0, abs(exact - 1) > noise)
    for name in _SPEEDS:
        ours_rounds, their_rounds = one.rounds.get(name), other.rounds.get(name)
        if ours_rounds and their_rounds and all(their_rounds):
            found = interval_of_ratios(their_rounds, ours_rounds)
            sure = found.coverage >= SURE and found.differs
            made[name] = RatioResult(found.median, found.low, found.high, found.coverage, sure)
    return made


def quality_ratio(ours: Sequence[float], theirs: Sequence[float]) -> RatioResult:
    """Our perplexity by theirs, window by window of one text.

    Args:
        ours: nats per token in each window.
    """
    return _sure(
        interval_of_ratios([1.0] * len(ours), [math.exp(min(a - b, 700.0)) for a, b in zip(ours, theirs, strict=True)])
    )


def _sure(found: Ratio) -> RatioResult:
    """A ratio of qualities, and whether it is beyond noise and more than nothing."""
    beyond = found.low > 1 or found.high < 1
    sure = found.coverage >= SURE and beyond and abs(found.median - 1) > SAME_QUALITY
    return RatioResult(found.median, found.low, found.high, found.coverage, sure)


def efficiency(row: Quantities, dense: Quantities) -> float | None:
    """Mean of parameters, operations, bits of a number and bytes of the file, each by the dense model's.

    As arXiv 2309.02031 counts; 1 for the dense model itself. What dense kernels compute and dense files store counts,
    so zeros alone change nothing.
    """
    ours = (row.parameters, row.flops_per_token, row.bytes_disk)
    theirs = (dense.parameters, dense.flops_per_token, dense.bytes_disk)
    if None in (*ours, *theirs):
        return None
    parts = [a / b for a, b in zip(ours, theirs, strict=True)]  # type: ignore[operator]
    bits = parts[2] / parts[0]
    return statistics.mean([*parts, bits])
