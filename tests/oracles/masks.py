"""Masks by sorting lists of (score, index): what exact counts and ties by index mean, in the plainest form."""

import torch


def keep_all_but_lowest(scores, k):
    """Keep-flags of a list of numbers."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    pruned = set(order[:k])
    return [i not in pruned for i in range(len(scores))]


def of_matrix(score, k):
    return torch.tensor(keep_all_but_lowest(score.flatten().tolist(), k)).reshape(score.shape)


def per_row(score, k):
    return torch.tensor([keep_all_but_lowest(row, k) for row in score.tolist()]).reshape(score.shape)


def per_group(score, keep, group):
    rows = []
    for row in score.tolist():
        flags = []
        for start in range(0, len(row), group):
            flags += keep_all_but_lowest(row[start : start + group], group - keep)
        rows.append(flags)
    return torch.tensor(rows)
