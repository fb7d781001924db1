"""Which inputs share a group of an N:M pattern: the order of the columns in which the pattern keeps most.

Given a saliency S >= 0, (columns, rows), the columns are divided into groups of M so that the sum over rows and groups
of the N largest is as large as possible. Up to twelve columns every division is looked at. Beyond that it is a search:
from the better of the given order and columns dealt out by their sums, columns of two groups change places as long as
that keeps more. In a round every group offers one column c and has a threshold t, the N-th largest of its others in
each row; as the group keeps sum max(c - t, 0) of c beside its others, what a pair of groups gains by the exchange is
(D_ab + D_ba - D_aa - D_bb) / 2 with D_ab = |c_a - t_b|_1. Pairs that are each other's best are taken together, if on
all rows they gain. D is O(groups^2 rows): of large matrices it is taken on some of the rows, others in each round, so
that the whole search is O(columns rows), about 500 differences for each weight.

Sources: Pool & Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021 (exchanges between groups); Zhang et al.,
"Plug-and-Play", ICLR 2024 (RIA: columns dealt out, then assigned by what one position of each group keeps; here the
assignment is made of exchanges, which needs no Hungarian algorithm and never loses).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.patterns import Pattern

EVERY = 12
"""Up to so many columns every division is looked at."""
WORK = 480
"""Differences that a search may take for each weight."""
ROUNDS = (10, 100)
"""Rounds of exchanges, at least and at most."""
PATIENCE = 12
"""Rounds without a gain worth having, after which the search ends."""
WORTH = 1e-5
"""Gain of a round that is worth having, as a share of what is kept."""
_AT_ONCE = 1 << 24
"""Numbers that are sorted at a time (64 MB in float32)."""
_NOISE = 1e-6
"""Of a sum in float32: no less counts as a gain."""


def best_order(saliency: Tensor, pattern: Pattern, seed: int = 0) -> Tensor:
    """The order of columns in which N of every M keep most; deterministic, and never worse than the given one.

    Args:
        saliency: what each weight is worth, >= 0, (columns, rows) float32, e.g. (1536, 576).
        pattern: M divides the columns.

    Returns:
        For each place the number of the column that comes there, (columns,) int64 on the CPU. Columns of a group, and
        groups, are in ascending order, so that what need not move does not.

    Raises:
        ValueError: when M does not divide the columns.
    """
    columns = saliency.shape[0]
    if pattern.unstructured or columns % pattern.group:
        raise ValueError(f"{columns} columns do not divide by {pattern.group}")
    given = torch.arange(columns).reshape(-1, pattern.group)
    if len(given) < 2:
        return given.reshape(-1)
    if columns <= EVERY:
        made = _best_of_all(saliency, pattern)
    else:
        made = _exchanged(saliency, pattern, _start(saliency, pattern, given), seed)
    if not _gains(kept_of_groups(saliency, made, pattern), kept_of_groups(saliency, given, pattern)):
        made = given
    made = made.sort(dim=1).values
    return made[made[:, 0].argsort()].reshape(-1)


def kept_share(saliency: Tensor, order: Tensor, pattern: Pattern) -> float:
    """Share of the saliency that N of every M columns keep in an order.

    Args:
        saliency: (columns, rows).
        order: (columns,) int64.
    """
    total = float(saliency.sum(dim=1).double().sum()) if saliency.device.type != "mps" else float(saliency.sum())
    kept = float(kept_of_groups(saliency, order.reshape(-1, pattern.group), pattern).sum())
    return kept / total if total else 1.0


def kept_of_groups(saliency: Tensor, groups: Tensor, pattern: Pattern) -> Tensor:
    """Sum over rows of the N largest in each group, (groups,) float64 on the CPU.

    Args:
        saliency: (columns, rows).
        groups: numbers of columns, (groups, M) int64.
    """
    parts = []
    for some in groups.split(max(1, _AT_ONCE // (saliency.shape[1] * pattern.group))):
        largest = _descending([saliency[some[:, place]] for place in range(pattern.group)])[: pattern.keep]
        parts.append(sum(lane.sum(dim=1) for lane in largest).cpu().double())  # type: ignore[union-attr]
    return torch.cat(parts)


def _gains(made: Tensor, given: Tensor) -> bool:
    return bool(made.sum() > given.sum() * (1 + _NOISE))


def _start(saliency: Tensor, pattern: Pattern, given: Tensor) -> Tensor:
    """The given groups, or columns dealt out by their sums, every other turn backwards: what keeps more."""
    ranked = saliency.sum(dim=1).cpu().argsort(descending=True, stable=True)
    turns = ranked.reshape(pattern.group, -1)
    turns[1::2] = turns[1::2].flip(1)
    dealt = turns.t().contiguous()
    better = _gains(kept_of_groups(saliency, dealt, pattern), kept_of_groups(saliency, given, pattern))
    return dealt if better else given.clone()


def _exchanged(saliency: Tensor, pattern: Pattern, groups: Tensor, seed: int) -> Tensor:
    """Groups that keep more, by exchanges of columns."""
    count, device = len(groups), saliency.device
    rounds = WORK * saliency.shape[0] / count**2  # with all rows in each
    step = min(math.ceil(max(1.0, ROUNDS[0] / rounds)), saliency.shape[1])
    kept = kept_of_groups(saliency, groups, pattern)
    generator = torch.Generator().manual_seed(seed)
    idle = 0
    for number in range(min(ROUNDS[1], max(ROUNDS[0], math.floor(rounds)))):
        some = saliency[:, number % step :: step].contiguous()
        offered = torch.randint(pattern.group, (count,), generator=generator)
        gains = _gains_of_pairs(some, groups.to(device), offered.to(device), pattern)
        pairs = _disjoint(gains).cpu()
        before = float(kept.sum())
        if len(pairs):
            tried = groups.clone()
            first, second = pairs.unbind(1)
            tried[first, offered[first]] = groups[second, offered[second]]
            tried[second, offered[second]] = groups[first, offered[first]]
            now = kept_of_groups(saliency, tried[pairs.reshape(-1)], pattern).reshape(-1, 2)
            good = now.sum(dim=1) > kept[pairs].sum(dim=1) * (1 + _NOISE)
            groups[pairs[good]] = tried[pairs[good]]
            kept[pairs[good]] = now[good]
        idle = 0 if float(kept.sum()) > before * (1 + WORTH) else idle + 1
        if idle == PATIENCE:
            break
    return groups


def _gains_of_pairs(saliency: Tensor, groups: Tensor, offered: Tensor, pattern: Pattern) -> Tensor:
    """What each pair of groups keeps more when the columns that they offer change places, (groups, groups)."""
    count, size = groups.shape
    places = torch.arange(size, device=groups.device).expand(count, size)
    others = groups[places != offered[:, None]].reshape(count, size - 1)
    own = saliency[groups[places == offered[:, None]]]
    threshold = torch.empty_like(own)
    for part in torch.arange(count, device=groups.device).split(max(1, _AT_ONCE // (own.shape[1] * size))):
        threshold[part] = _descending([saliency[others[part, place]] for place in range(size - 1)])[pattern.keep - 1]
    distance = torch.cdist(own[None], threshold[None], p=1.0)[0]
    alone = distance.diagonal()
    return (distance + distance.t() - alone - alone[:, None]) / 2


def _disjoint(gains: Tensor) -> Tensor:
    """Pairs with a gain, none of them with a member in common: again and again those that are each other's best."""
    gains = gains.clone().fill_diagonal_(-1.0)
    number = torch.arange(len(gains), device=gains.device)
    found = []
    while True:
        most, partner = gains.max(dim=1)
        first = number[(most > 0) & (partner[partner] == number) & (number < partner)]
        if not len(first):  # none is left, or equals stand in a ring
            break
        pairs = torch.stack([first, partner[first]], dim=1)
        found.append(pairs)
        gains[pairs.reshape(-1)] = -1.0
        gains[:, pairs.reshape(-1)] = -1.0
    return torch.cat(found) if found else number.new_empty(0, 2)


def _best_of_all(saliency: Tensor, pattern: Pattern) -> Tensor:
    """The best of every division of a few columns into groups; of equals the first."""
    columns, size = saliency.shape[0], pattern.group
    every = list(itertools.combinations(range(columns), size))
    worth = dict(zip(every, kept_of_groups(saliency, torch.tensor(every), pattern).tolist(), strict=True))

    def best(left: Sequence[int]) -> tuple[float, list[tuple[int, ...]]]:
        if not left:
            return 0.0, []
        most, chosen = -math.inf, list[tuple[int, ...]]()
        for others in itertools.combinations(left[1:], size - 1):
            group = (left[0], *others)
            rest, groups = best([column for column in left if column not in group])
            if worth[group] + rest > most:
                most, chosen = worth[group] + rest, [group, *groups]
        return most, chosen

    return torch.tensor(best(range(columns))[1])


def _descending(lanes: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape, sorted place by place: exchanges of neighbours, as many turns as there are tensors."""
    made = list(lanes)
    for turn in range(len(made)):
        for at in range(turn % 2, len(made) - 1, 2):
            made[at], made[at + 1] = torch.maximum(made[at], made[at + 1]), torch.minimum(made[at], made[at + 1])
    return made
