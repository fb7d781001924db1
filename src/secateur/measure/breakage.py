"""What breaks in a pruned model, and why: the states of its tokens beside those of the dense model.

After "Robustness Lottery" (arXiv 2206.07918), which looks at the last state of a network and the row of the true class:
for every token the change of the angle between them, of the state's length, and of the margin to the strongest rival;
here with the tokens of a text as classes, and on text that was damaged as well.

The change in loss has two parts where the logits are linear in the state: what the new length alone does to the dense
model's loss (its direction kept), and the rest, which is the direction's. Length alone never changes which token is the
likeliest; it changes how sure the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from secateur.measure.corruptions import align
from secateur.measure.token_losses import standard_error
from secateur.measure.token_states import TokenStates
from secateur.report_result import BrokenToken, Condition, Distribution

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
WORST = 15
"""Tokens that are named."""
_BEFORE = 12
"""Tokens of text that are told before each."""
CLEAN = "clean"
QUANTITIES: tuple[Literal["angle", "length", "margin"], ...] = ("angle", "length", "margin")


@dataclass(frozen=True)
class Window:
    """One window of one condition, in both models; ``shortened``: dense losses at the pruned lengths, if known."""

    condition: str
    part: int
    """Number of the clean window that it was made from."""
    tokens: torch.Tensor
    """(n + 1,) int64, the first one included."""
    dense: TokenStates
    pruned: TokenStates
    shortened: torch.Tensor | None = None


def changes(windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Of all tokens of some windows, (n,): angle in degrees, length relative to the dense one, margin, loss in nats."""
    dense, pruned = _both(windows)
    return {
        "angle": pruned["angle"] - dense["angle"],
        "length": (pruned["length"] - dense["length"]) / dense["length"],
        "margin": pruned["margin"] - dense["margin"],
        "loss": pruned["loss"] - dense["loss"],
    }


def _both(windows: Sequence[Window]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    names = ("loss", "angle", "length", "margin")
    sides = [[w.dense for w in windows], [w.pruned for w in windows]]
    dense, pruned = ({n: torch.cat([getattr(states, n) for states in side]) for n in names} for side in sides)
    return dense, pruned


def distributions(windows: Sequence[Window], condition: str) -> list[Distribution]:
    """How angle, length and margin are spread over the tokens of one condition."""
    chosen = [window for window in windows if window.condition == condition]
    dense, pruned = _both(chosen)
    change = changes(chosen)
    found = []
    for quantity in QUANTITIES:
        a, b = dense[quantity], pruned[quantity]
        low, high = min(float(a.min()), float(b.min())), max(float(a.max()), float(b.max()))
        edges = torch.linspace(low, high if high > low else low + 1.0, BINS + 1, dtype=torch.float64)
        counts = [[int(count) for count in torch.histogram(side, bins=edges).hist] for side in (a, b)]
        found.append(
            Distribution(
                quantity,
                condition,
                quantiles=list(LEVELS),
                dense=_quantiles(a),
                pruned=_quantiles(b),
                change=_quantiles(change[quantity]),
                edges=edges.tolist(),
                dense_counts=counts[0],
                pruned_counts=counts[1],
            )
        )
    return found


def _quantiles(values: torch.Tensor) -> list[float]:
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return [float(value) for value in torch.quantile(values, levels)]


def conditions(windows: Sequence[Window]) -> list[Condition]:
    """One row for the clean text and one for each corruption, in the order in which they come."""
    clean = {window.part: window for window in windows if window.condition == CLEAN}
    found = []
    for name in dict.fromkeys(window.condition for window in windows):
        chosen = [window for window in windows if window.condition == name]
        dense, pruned = _both(chosen)
        difference = pruned["loss"] - dense["loss"]
        right, still = dense["margin"] > 0, pruned["margin"] > 0
        row = Condition(
            name=name,
            tokens=len(difference),
            dense_loss=float(dense["loss"].mean()),
            pruned_loss=float(pruned["loss"].mean()),
            difference_stderr=standard_error(difference),
            dense_right=_share(right),
            pruned_right=_share(still),
            lost=_share(right & ~still),
            gained=_share(~right & still),
        )
        shortened = [window.shortened for window in chosen if window.shortened is not None]
        if len(shortened) == len(chosen):
            row.length_part = float((torch.cat(shortened) - dense["loss"]).mean())
            row.direction_part = float((pruned["loss"] - torch.cat(shortened)).mean())
        if name != CLEAN:
            _damage(row, chosen, clean)
        found.append(row)
    return found


def _share(mask: torch.Tensor) -> float:
    return float(mask.double().mean())


def _damage(row: Condition, chosen: Sequence[Window], clean: dict[int, Window]) -> None:
    """What the corruption adds to the loss of the tokens that it left in place."""
    dense, pruned = [], []
    for window in chosen:
        base = clean[window.part]
        pairs = align(base.tokens.tolist(), window.tokens.tolist())
        places = torch.tensor([(a - 1, b - 1) for a, b in pairs if a and b], dtype=torch.int64).view(-1, 2)
        dense.append(window.dense.loss[places[:, 1]] - base.dense.loss[places[:, 0]])
        pruned.append(window.pruned.loss[places[:, 1]] - base.pruned.loss[places[:, 0]])
    row.aligned = sum(len(part) for part in dense)
    if row.aligned:
        row.dense_damage, row.pruned_damage = float(torch.cat(dense).mean()), float(torch.cat(pruned).mean())
        row.damage_stderr = standard_error(torch.cat(pruned) - torch.cat(dense))


def most_broken(windows: Sequence[Window], decode: Callable[[list[int]], str]) -> list[BrokenToken]:
    """The tokens, of all conditions, whose margin fell farthest; none where it fell nowhere."""
    fallen = []
    for number, window in enumerate(windows):
        fall = window.pruned.margin - window.dense.margin
        fallen += [(float(value), number, place) for place, value in enumerate(fall) if value < 0]
    found = []
    for _, number, place in sorted(fallen)[:WORST]:
        window = windows[number]
        change = changes([window])
        before = window.tokens[max(0, place + 1 - _BEFORE) : place + 1].tolist()
        found.append(
            BrokenToken(
                window.condition,
                decode(before),
                decode([int(window.tokens[place + 1])]),
                decode([int(window.pruned.rivals[place])]),
                float(window.dense.margin[place]),
                float(window.pruned.margin[place]),
                *(float(change[name][place]) for name in ("angle", "length", "loss")),
            )
        )
    return found


def sentences(rows: Sequence[Condition], spread: Sequence[Distribution]) -> list[str]:
    """What the numbers say, for the clean text first and then of the damage."""
    clean = rows[0]
    middle = {d.quantity: (d.dense[2], d.pruned[2], d.change[2]) for d in spread if d.condition == CLEAN}
    loss = clean.pruned_loss - clean.dense_loss
    error = clean.difference_stderr or 0.0
    if abs(loss) <= 2 * error or loss == 0:
        said = [
            f"On clean text no difference in loss is shown: {loss:+.3f} nats per token, standard error {error:.3f}."
        ]
    else:
        said = [
            f"On clean text the loss went from {clean.dense_loss:.3f} to {clean.pruned_loss:.3f} nats per token; "
            f"{clean.lost:.1%} of the tokens lost the first place and {clean.gained:.1%} gained it."
        ]
    if clean.length_part is not None and clean.direction_part is not None and abs(loss) > 2 * error:
        more = "direction" if abs(clean.direction_part) >= abs(clean.length_part) else "length"
        said.append(
            f"Most of it is the {more} of the states: the direction makes {clean.direction_part:+.3f} nats of the "
            f"difference, the length {clean.length_part:+.3f}."
        )
    angle, length, margin = middle["angle"], middle["length"], middle["margin"]
    said.append(
        f"In the middle token the angle to the true row changes by {angle[2]:+.2f} degrees (from {angle[0]:.1f}), the "
        f"length by {length[2]:+.1%}, the margin to the strongest rival by {margin[2]:+.2f}."
    )
    hurt = [row for row in rows if row.dense_damage is not None and row.pruned_damage is not None]
    if hurt:
        worst = max(hurt, key=_excess)
        shown = _excess(worst) > 2 * (worst.damage_stderr or 0.0) and _excess(worst) > 0
        said.append(
            f"Of the corruptions, {worst.name} costs the pruned model most beside the dense one: "
            f"{worst.pruned_damage:+.3f} against {worst.dense_damage:+.3f} nats on the tokens left in place; "
            + ("it is less robust to it." if shown else "that it is less robust is not shown.")
        )
    return said


def _excess(row: Condition) -> float:
    return (row.pruned_damage or 0.0) - (row.dense_damage or 0.0)
