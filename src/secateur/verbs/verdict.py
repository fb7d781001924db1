"""What the numbers mean, in plain sentences: which got better, which did not, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.measure.compare import Ratio
from secateur.result import Measured, PrunedMatrix


def sentences(before: Measured, after: Measured, decode: Ratio | None, removed: float | None = None) -> list[str]:
    """One sentence each on quality, size, memory and speed, as far as they were measured.

    Args:
        removed: share of the prunable weights that are not there any more; None when single weights became zero.
    """
    first = _sparsity(after) if removed is None else _removal(before, after, removed)
    said = [first, *_quality(before, after), _size(before, after, removed)]
    if before.bytes_resident and after.bytes_resident:
        said.append(_memory(before.bytes_resident, after.bytes_resident, removed))
    if decode is not None:
        said.append(_speed(decode, smaller=removed is not None))
    return said


def refit_sentences(matrices: Sequence[PrunedMatrix], asked: bool | None) -> list[str]:
    """Whether the kept weights were solved anew, and what it brought; nothing where nobody would expect it.

    Args:
        asked: ``refit`` of the recipe.
    """
    pairs = [
        (one.loss_before_refit, one.loss if one.loss_before_rounding is None else one.loss_before_rounding)
        for one in matrices if one.loss_before_refit
    ]  # fmt: skip
    ratios = [math.log(max(after, 1e-30) / before) for before, after in pairs if before and after is not None]
    if ratios:
        gone = 1 - math.exp(sum(ratios) / len(ratios))
        return [
            f"Kept weights were solved anew by least squares in {len(ratios)} matrices: the squared error of their "
            f"outputs on the calibration data fell by {gone:.0%} (geometric mean)."
        ]
    return ["Kept weights were not solved anew (--no-refit)."] if asked is False else []


def permutation_sentences(matrices: Sequence[PrunedMatrix]) -> list[str]:
    """What another order of the inputs brought, where one was searched."""
    pairs = [one.saliency_kept for one in matrices if one.saliency_kept is not None]
    if not pairs:
        return []
    moved = sum(one.order is not None for one in matrices)
    before, after = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    return [
        f"Inputs of {moved} matrices were put in another order first, which changes nothing in the dense model: the "
        f"pattern keeps {after:.1%} of their saliency, {before:.1%} in the order of the source (mean)."
    ]


def correction_sentences(matrices: Sequence[PrunedMatrix]) -> list[str]:
    """How much of the correction of earlier errors was taken, where there was one."""
    shares = sorted(one.beta for one in matrices if one.beta is not None)
    if not shares:
        return []
    middle = shares[len(shares) // 2]
    return [
        f"Errors of earlier matrices were corrected in {len(shares)} of {len(matrices)}: share of the correction "
        f"{middle:.2f} (median; {shares[0]:.2f} to {shares[-1]:.2f})."
    ]


def rounding_sentences(matrices: Sequence[PrunedMatrix], bits: int | None, group_size: int) -> list[str]:
    """What the rounding of the kept weights added to the error; nothing where they were not rounded."""
    if bits is None:
        return []
    said = f"Kept weights were rounded to {bits} bits, {group_size} to a scale"
    pairs = [(one.loss_before_rounding, one.loss) for one in matrices if one.loss_before_rounding]
    ratios = [math.log(after / before) for before, after in pairs if before and after]
    if not ratios:
        return [f"{said}."]
    more = math.exp(sum(ratios) / len(ratios)) - 1
    return [
        f"{said}: the squared error of the outputs of {len(ratios)} matrices on the calibration data "
        f"{'grew' if more >= 0 else 'fell'} by {abs(more):.1%} (geometric mean)."
    ]


def reconstruction_sentences(matrices: Sequence[PrunedMatrix]) -> list[str]:
    """What the training of blocks did to the error of their outputs on data held out, where there was one."""
    pairs = [one.held_out_error for one in matrices if one.held_out_error is not None]
    # The matrices of a block, or of a half, have one error together.
    errors = [pair for at, pair in enumerate(pairs) if at == 0 or pair != pairs[at - 1]]
    if not errors:
        return []
    before, after = (sum(pair[side] for pair in errors) / len(errors) for side in (0, 1))
    same = sum(pair[0] == pair[1] for pair in errors)
    kept = f"; {same} stayed as they were, as nothing did better" if same else ""
    return [
        f"Blocks were reconstructed {len(errors)} times: their relative squared error on calibration data held out "
        f"went from {before:.3g} to {after:.3g} (mean){kept}."
    ]


def conversion_sentences(
    told: Sequence[str], before: Measured, after: Measured, decode: Ratio | None, *, needs_training: bool
) -> list[str]:
    """What a conversion says of itself, then quality, size, memory and speed, as far as they were measured."""
    said = [*told, *_quality(before, after), _size(before, after, 0.0)]
    if before.bytes_resident and after.bytes_resident:
        said.append(_memory(before.bytes_resident, after.bytes_resident, 0.0))
    if decode is not None:
        said.append(_speed(decode, smaller=True))
    if needs_training:
        said.append("Train it before use: secateur recover OUT --dense.")
    return said


def recovery_sentences(
    teacher: Measured | None, before: Measured, after: Measured, training: Mapping[str, Any],
    *, checked: bool,
) -> list[str]:  # fmt: skip
    """What training brought, how much of the way to the dense model it is, and whether it generalises.

    Args:
        checked: the held zeros were looked at in what was written.
    """
    proof = "every held zero was checked" if checked else "the held zeros were not checked in what was written"
    said = [f"{after.sparsity:.1%} of the prunable weights are zero, as before: {proof}."]
    more = after.parameters - before.parameters
    if more > 0:
        said.append(f"It has {more:,} parameters more than before ({more / before.parameters:+.1%}).")
    said += _quality(before, after)
    if teacher is not None and None not in (teacher.nll_per_token, before.nll_per_token, after.nll_per_token):
        assert teacher.nll_per_token is not None
        assert before.nll_per_token is not None
        assert after.nll_per_token is not None
        excess = before.nll_per_token - teacher.nll_per_token
        if excess > 0.005:
            gone = (before.nll_per_token - after.nll_per_token) / excess
            said.append(
                f"The dense model has perplexity {teacher.perplexity:.2f}: {gone:.0%} of the loss above it is gone."
            )
    gap = training.get("generalisation_gap")
    if gap is not None:
        said.append(
            f"On text that was held out the loss is {training['held_out_loss']:.3f} "
            f"({training['held_out_loss_before']:.3f} before). The gap to text that was trained on went from "
            f"{training['generalisation_gap_before']:+.3f} to {gap:+.3f}."
        )
    return said


def _sparsity(after: Measured) -> str:
    share = 1 - after.nonzero / after.parameters
    return f"{after.sparsity:.1%} of the prunable weights are zero, {share:.1%} of all parameters."


def _removal(before: Measured, after: Measured, removed: float) -> str:
    share = 1 - after.parameters / before.parameters
    return f"{removed:.1%} of the prunable weights are gone, {share:.1%} of all parameters."


def _quality(before: Measured, after: Measured) -> list[str]:
    said = []
    if before.perplexity and after.perplexity and before.nll_per_token is not None and after.nll_per_token is not None:
        change = after.nll_per_token - before.nll_per_token
        ratio = math.exp(change)
        word = "worse" if change > 0 else "better"
        if abs(change) < 0.005:
            said.append(
                f"Quality is unchanged: perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after."
            )
        else:
            said.append(
                f"Quality is {word}: perplexity went from {before.perplexity:.2f} to {after.perplexity:.2f} "
                f"({ratio:.2f} times, {change:+.2f} nats per token)."
            )
    for name, value in before.accuracy.items():
        if name in after.accuracy:
            points = 100 * (after.accuracy[name] - value)
            said.append(
                f"Accuracy on {name} went from {value:.1%} to {after.accuracy[name]:.1%} ({points:+.1f} points)."
            )
    return said


def _size(before: Measured, after: Measured, removed: float | None) -> str:
    ratio = after.bytes_disk / before.bytes_disk
    if abs(ratio - 1) < 0.001:
        why = " Zeros alone do not shrink a dense file; that takes a format which leaves them out."
        same = f"The file is not smaller: {after.bytes_disk:,} bytes as {after.dtype}, like before."
        return same + (why if removed is None else "")
    if before.dtype != after.dtype:
        return f"The file has {ratio:.2f} times the bytes: it is stored as {after.dtype}, before as {before.dtype}."
    return f"The file has {ratio:.2f} times the bytes."


def _memory(before: int, after: int, removed: float | None) -> str:
    ratio = after / before
    if 0.95 < ratio < 1.05:
        return "It takes the same memory when loaded" + (
            ": a zero is stored like any other number." if removed is None else ", within a twentieth."
        )
    return f"It takes {ratio:.2f} times the memory when loaded."


def _speed(decode: Ratio, smaller: bool) -> str:
    interval = f"ratio {decode.median:.2f}, between {decode.low:.2f} and {decode.high:.2f}"
    if not decode.differs and smaller:
        return f"Decoding is not faster beyond noise ({interval})."
    if not decode.differs:
        return f"It is not faster beyond noise ({interval}): dense kernels multiply zeros like any other number."
    word = "faster" if decode.median > 1 else "slower"
    return f"Decoding is {word} ({interval})."
