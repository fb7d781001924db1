"""What a comparison means, in plain sentences: per quantity better, worse, or no difference shown, and why."""

from __future__ import annotations

from secateur.bench_result import BenchResult, Quantities, RatioResult

_TIMED = (
    ("prefill_tokens_per_second", "Reading a prompt"),
    ("decode_tokens_per_second", "Decoding"),
    ("decode_tokens_per_second_batch_8", "Decoding eight rows at once"),
)
"""Higher is faster. The time to the first token is that of reading the prompt."""


def bench_sentences(result: BenchResult) -> list[str]:
    """One sentence for every quantity and model compared, then what wins at equal bytes."""
    said: list[str] = []
    rows = {row.label: row for row in result.against}
    for name, ratio in result.ratio.items():
        said += [f"Against {name}: {sentence}" for sentence in _against(result, rows[name], ratio)]
    return said + _at_equal_bytes(result)


def _against(ours: Quantities, theirs: Quantities, ratio: dict[str, RatioResult]) -> list[str]:
    said = []
    if "parameters" in ratio and "nonzero" in ratio:
        said.append(_weights(ratio["parameters"], ratio["nonzero"]))
    if "bytes_disk" in ratio:
        said.append(_exact("The file", "the bytes", ratio["bytes_disk"], _why_size(ours, theirs, ratio)))
    if "bytes_resident" in ratio:
        said.append(_exact("It", "the memory when loaded", ratio["bytes_resident"], ""))
    if "flops_per_token" in ratio:
        why = _why_operations(ratio["flops_per_token"], ratio.get("sparse_flops_per_token"))
        said.append(_exact("A token", "the operations", ratio["flops_per_token"], why))
    named = next((name for name in ("perplexity", "bits_per_byte") if name in ratio), None)
    if named is not None:
        found = ratio[named]
        word = "worse" if found.median > 1 else "better"
        one, other = getattr(ours, named), getattr(theirs, named)
        bits = "bits per byte, as their vocabularies differ:"
        values = (
            f"{bits} {one:.3f} and {other:.3f}" if named != "perplexity" else f"perplexity {one:.2f} and {other:.2f}"
        )
        beside = f"{values}; ratio of a window {found.median:.3f}, between {found.low:.3f} and {found.high:.3f}"
        same = f"{found.low:.2f}" == f"{found.high:.2f}" == "1.00"
        said.append(f"quality is {word} ({beside})." if found.differs else
                    f"quality is the same ({values})." if same else
                    f"no difference shown in quality ({beside}).")  # fmt: skip
    for name, subject in _TIMED:
        if name in ratio:
            said.append(_timed(subject, ratio[name], _why_speed(name, ours, theirs, ratio[name])))
    if "joules_per_token" in ratio:
        found = ratio["joules_per_token"]
        word = "more" if found.median > 1 else "less"
        interval = f"ratio {found.median:.2f}, between {found.low:.2f} and {found.high:.2f}"
        said.append(f"a token takes {word} energy ({interval})." if found.differs else
                    f"no difference shown in energy per token ({interval}).")  # fmt: skip
    return said


def _weights(all_: RatioResult, nonzero: RatioResult) -> str:
    told = f"{all_.median:.2f} times the weights" if all_.differs else "the same number of weights"
    left = f"{nonzero.median:.2f} times as many" if nonzero.differs else "as many"
    return f"it has {told}, and {left} that are not zero."


def _exact(subject: str, what: str, found: RatioResult, why: str) -> str:
    first = subject[0].lower() + subject[1:]
    if not found.differs:
        return f"{first} takes {what.replace('the ', 'the same ', 1)}{why}."
    return f"{first} takes {found.median:.2f} times {what}{why}."


def _timed(subject: str, found: RatioResult, why: str) -> str:
    interval = f"ratio {found.median:.2f}, between {found.low:.2f} and {found.high:.2f}"
    first = subject[0].lower() + subject[1:]
    if not found.differs:
        return f"no difference shown in {first} ({interval}){why}."
    return f"{first} is {'faster' if found.median > 1 else 'slower'} ({interval}){why}."


def _has_more_zeros(ours: Quantities, theirs: Quantities) -> bool:
    return (
        None not in (ours.nonzero, theirs.nonzero)
        and ours.parameters == theirs.parameters
        and (ours.nonzero or 0) < 0.95 * (theirs.nonzero or 0)
    )


def _why_size(ours: Quantities, theirs: Quantities, ratio: dict[str, RatioResult]) -> str:
    found = ratio["bytes_disk"]
    if not found.differs and not ours.packed and _has_more_zeros(ours, theirs):
        return ": a dense file stores a zero like any other number"
    if found.median < 1 and ours.packed and _has_more_zeros(ours, theirs):
        return ": of a zero it stores a bit"
    return ""


def _why_operations(found: RatioResult, without: RatioResult | None) -> str:
    """What dense kernels do counts; what others would do is told where it is something else."""
    if without is None or f"{without.median:.2f}" == f"{found.median:.2f}":
        return ""
    return f", and would take {without.median:.2f} times with kernels that leave zeros out"


def _why_speed(name: str, ours: Quantities, theirs: Quantities, found: RatioResult) -> str:
    """The cause, where it is known: of packed weights in the direction in which it works."""
    if not (ours.packed or theirs.packed):
        same = ours.runtime == theirs.runtime and ours.format == theirs.format
        if same and not found.differs and _has_more_zeros(ours, theirs):
            return ": the same dense kernels run, and zeros do not make them faster"
        return ""
    prompt = name == "prefill_tokens_per_second"
    for row, other, whose, ahead in (
        (ours, theirs, "its", found.median > 1), (theirs, ours, "the other's", found.median < 1)
    ):  # fmt: skip
        if not (row.packed and found.differs):
            continue
        zeros = _has_more_zeros(row, other)
        if row.kernels is None and not ahead:
            return f": {whose} packed weights are unpacked each time they are used ({row.missing['kernels']})"
        if row.kernels is not None and prompt and not ahead:
            return f": for a prompt {whose} weights are unpacked{', and zeros save nothing' if zeros else ''}"
        if row.kernels is not None and not prompt and ahead:
            return f": the kernels read {whose} weights packed{', and zeros are skipped' if zeros else ''}"
    return ""


def _at_equal_bytes(result: BenchResult) -> list[str]:
    """Which model to take when bytes are what counts: none other as small is as good, or which ones are.

    By perplexity; where one of the models has another vocabulary, by bits per byte.
    """
    rows = [row for row in result.against if row.bytes_disk and (row.perplexity or row.bits_per_byte)]
    named = "bits_per_byte" if any(row.perplexity is None for row in rows) else "perplexity"
    own = getattr(result, named)
    rows = [row for row in rows if getattr(row, named) is not None]
    if own is None or not result.bytes_disk or not rows:
        return []
    ours, whole = _told(result, named), f"{result.name} as {result.format}"
    fitting = [row for row in rows if (row.bytes_disk or 0) <= 1.02 * result.bytes_disk]
    if not fitting:
        row = min(rows, key=lambda row: row.bytes_disk or 0)
        return [
            f"At equal bytes {whole} ({ours}) stands alone, which is no win: the smallest compared is {row.name} as "
            f"{row.format} ({_told(row, named)})."
        ]
    row = min(fitting, key=lambda row: float(getattr(row, named)))
    if getattr(row, named) >= own:
        return [f"At equal bytes {whole} wins ({ours}): nothing compared is as small and better."]
    return [f"At equal bytes {row.name} as {row.format} wins ({_told(row, named)}) over {whole} ({ours})."]


def _told(row: Quantities, named: str) -> str:
    value = f"perplexity {row.perplexity:.2f}" if named == "perplexity" else f"{row.bits_per_byte:.3f} bits per byte"
    return f"{(row.bytes_disk or 0) / 1e6:,.1f} MB, {value}"
