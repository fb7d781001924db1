"""Boza's ADMM written from the paper, in float64, row by row and with a solve in every iteration. Slow and plain."""

import torch


def admm(weight, inputs, *, sparsity=None, keep=0, group=0, iterations=20, mask_iterations=15, damping=0.1, rho=1.0):
    """Mask and values; the weight has its own units again."""
    w, x = weight.double(), inputs.double()
    h = x.T @ x
    n = h.diagonal().sqrt()
    a = h / torch.outer(n, n) + damping * torch.eye(len(h), dtype=torch.float64)
    dense = w * n
    mask = torch.ones_like(dense, dtype=torch.bool)
    b, u = dense.clone(), torch.zeros_like(dense)
    for t in range(1, iterations + 1):
        if t <= mask_iterations:
            mask = _mask((b + u).abs(), 1 - (1 - t / mask_iterations) ** 3, sparsity, keep, group)
        d = (b + u) * mask
        u = u + b - d
        b = torch.linalg.solve(a + rho * torch.eye(len(a), dtype=torch.float64), (dense @ a + rho * (d - u)).T).T
    return (b + u) * mask / n, mask


def _mask(score, share, sparsity, keep, group):
    """Places by ascending score; the first of those that may go lose their weight."""
    rows, columns = score.shape
    safe = set()
    if group:
        for i in range(rows):
            for start in range(0, columns, group):
                order = sorted(range(start, start + group), key=lambda j: (float(score[i, j]), j))
                safe.update((i, j) for j in order[group - keep :])
    total = round(sparsity * rows * columns) if not group else rows * columns - len(safe)
    places = sorted(
        ((i, j) for i in range(rows) for j in range(columns) if (i, j) not in safe),
        key=lambda place: (float(score[place]), place),
    )
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for place in places[: round(share * total)]:
        mask[place] = False
    return mask
