"""Seeds of their own for parts of a run, so that the order of work and a resumed run change nothing."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *names: str | int) -> int:
    """A seed of 63 bits that depends on the run's seed and on what it is for, and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
