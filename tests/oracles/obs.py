"""Optimal brain surgery column by column in float64, with a fresh inverse for each column. Slow and plain."""

import torch

from tests.oracles import masks


def sparsegpt(weight, inputs, *, sparsity=None, keep=0, group=0, block_size=128, damping=0.01):
    """Prune by the text of the paper: fix one column at a time and move its error to all columns that follow.

    Returns the pruned weight (float64), the keep-mask, and the squared error of the outputs on ``inputs``.
    """
    w = weight.double().clone()
    x = inputs.double()
    rows, columns = w.shape
    h = x.T @ x
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h[dead, dead] = mean
    h += damping * mean * torch.eye(columns, dtype=torch.float64)
    # Inverse of H over the columns that are still free, for each first free column.
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    price = torch.stack([1 / inverses[j][0, 0] for j in range(columns)])  # 1 / [H^-1]_jj
    price[dead] = 0.0
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if group and j % group == 0:
            score = w[:, j : j + group] ** 2 * price[j : j + group]
            mask[:, j : j + group] = masks.per_group(score, keep, group)
        if not group and j % block_size == 0:
            score = w[:, j : j + block_size] ** 2 * price[j : j + block_size]
            mask[:, j : j + block_size] = masks.of_matrix(score, round(sparsity * score.numel()))
        error = torch.where(mask[:, j], 0.0, w[:, j])
        w[:, j:] -= torch.outer(error, inverses[j][0] / inverses[j][0, 0])
        w[~mask[:, j], j] = 0.0
    loss = ((x @ (w - weight.double()).T) ** 2).sum()
    return w, mask, float(loss)
