"""The search of ALPS written from the paper, in float64, with a fresh solve in every iteration. Slow and plain."""

import torch

from tests.oracles import masks


def alps(weight, inputs, *, sparsity=None, keep=0, group=0, iterations=60, settled=0.0, damping=0.01, rho=0.1):
    """Mask and values after the search and an exact solve on the mask; the weight has its own units again."""
    w, x = weight.double(), inputs.double()
    h = x.T @ x
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    n = h.diagonal().sqrt()
    a = h / torch.outer(n, n)
    dense = w * n

    def project(values):
        score = values.abs()
        if group:
            return torch.cat(
                [masks.per_group(score[:, j : j + group], keep, group) for j in range(0, score.shape[1], group)], dim=1
            )
        return masks.of_matrix(score, round(sparsity * score.numel()))

    mask = project(dense)
    d, v = dense * mask, torch.zeros_like(dense)
    previous = mask
    for t in range(1, iterations + 1):
        b = torch.linalg.solve(a + rho * torch.eye(len(a), dtype=torch.float64), (dense @ a - v + rho * d).T).T
        mask = project(b + v / rho)
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if t % 3 == 0:
            delta = int((mask & ~previous).sum()) / int(mask.sum())
            previous = mask
            if t >= 9 and delta <= settled:
                break
            rho *= 1.3 if delta > 0.1 else 1.2 if delta > 0.005 else 1.1 if delta > 0 else 1.0
    best = torch.zeros_like(dense)
    for row in range(len(dense)):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            best[row, kept] = torch.linalg.solve(a[kept][:, kept], (a @ dense[row])[kept])
    return best / n, mask
