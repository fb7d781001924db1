"""RIA's score written from the paper, weight by weight, in Python numbers."""


def ria(weight, inputs, power=0.5):
    """Score of each weight as nested lists."""
    rows, columns = weight.shape
    size = [[abs(float(weight[i, j])) for j in range(columns)] for i in range(rows)]
    norm = [(sum(float(v) ** 2 for v in inputs[:, j]) / len(inputs)) ** 0.5 for j in range(columns)]
    along = [sum(size[i][j] for i in range(rows)) for j in range(columns)]
    across = [sum(row) for row in size]
    return [
        [
            (
                (size[i][j] / across[i] if across[i] else 0.0) + (size[i][j] / along[j] if along[j] else 0.0)
            ) * norm[j] ** power
            for j in range(columns)
        ]
        for i in range(rows)
    ]  # fmt: skip
