"""What the dense model says about the training text, kept on disk, so that it need not be in memory beside the student.

For each token the k most likely next tokens and the logarithms of their probabilities: 6 bytes for each of the k
(4 with a vocabulary below 65,536). A cache is found by its content: the teacher's weights, the tokens, k and how it was
computed.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers

from secateur.checkpoint.cache import build_once, cache_folder
from secateur.errors import DiskSpaceError, OutputError
from secateur.progress import Reporter

_POSITIONS = 256
"""Positions whose log-softmax is in float32 at one time."""


@dataclass(frozen=True)
class TeacherLogits:
    """The cache of one text: row ``i`` belongs to window ``i``."""

    ids: Any
    """(windows, tokens, k) integers, mapped from disk."""
    log_probabilities: Any
    """(windows, tokens, k) float16, mapped from disk."""

    def __getitem__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes (tokens, k) int64 and their log-probabilities (tokens, k) float32 of one window."""
        ids = torch.from_numpy(np.array(self.ids[window], dtype=np.int64))
        return ids, torch.from_numpy(np.array(self.log_probabilities[window], dtype=np.float32))


@torch.no_grad()
def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely classes of each row and their log-probabilities.

    Args:
        logits: (..., classes).

    Returns:
        ids (..., k) int64 and log-probabilities (..., k) float32; k is cut down to the number of classes.
    """
    k = min(k, logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    found = []
    for rows in flat.split(_POSITIONS):
        values, ids = rows.topk(k, dim=-1)
        found.append((ids, values.float() - rows.float().logsumexp(-1, keepdim=True)))
    shape = (*logits.shape[:-1], k)
    return torch.cat([i for i, _ in found]).reshape(shape), torch.cat([v for _, v in found]).reshape(shape)


def cache_key(teacher_sha256: str, windows: torch.Tensor, k: int, dtype: torch.dtype, device: str = "cpu") -> str:
    """Name of a cache: equal when everything that decides its content is equal.

    Args:
        teacher_sha256: of weights and config.
        device: the type, since other kernels round otherwise.
    """
    tokens = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()
    made_by = [device, torch.__version__, transformers.__version__]
    parts = ["2", teacher_sha256, tokens, str(tuple(windows.shape)), str(k), str(dtype), *made_by]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def cached_folder(key: str) -> Path:
    """Where a cache of this name is, or would be."""
    return cache_folder() / "teachers" / key


def open_cache(key: str) -> TeacherLogits:
    """Open a cache that is there.

    Raises:
        OutputError: when its files are damaged or gone.
    """
    folder = cached_folder(key)
    try:
        arrays = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in ("ids.npy", "log.npy")]
        if any(array.ndim != 3 for array in arrays) or arrays[0].shape != arrays[1].shape:
            raise ValueError("its two files do not fit together")
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(
            f"the teacher's logits in {folder} are damaged: {reason}", hint="remove this folder, they are made again"
        ) from error
    return TeacherLogits(*arrays)


def build_cache(
    key: str, teacher: Any, windows: torch.Tensor, k: int, *, dtype: torch.dtype, reporter: Reporter
) -> TeacherLogits:
    """Run the teacher over all windows and keep what it says.

    Args:
        teacher: a model with next-token logits, in eval mode.
        windows: (count, length) int64.
        dtype: number format of the teacher's forward.

    Raises:
        OutputError: when the cache cannot be written.
    """
    count, length = windows.shape
    classes = teacher.config.get_text_config().vocab_size
    k = min(k, classes)
    small = classes <= 1 << 16

    shape = (count, length, k)
    kind = np.dtype(np.uint16 if small else np.int32)
    needed = count * length * k * (kind.itemsize + 2)

    def build(folder: Path) -> None:
        if needed > (free := shutil.disk_usage(folder).free):
            raise DiskSpaceError(
                f"the teacher's logits need {needed:,} bytes, {folder.parent} has {free:,} left",
                hint="free some space, choose another cache with SECATEUR_CACHE, or use fewer --tokens or --top-k",
            )
        device = next(teacher.parameters()).device
        reporter.stage("asking the teacher", count)
        # Written piece by piece rather than through a mapping, where a full disk would end the process.
        with (
            _open_array(folder / "ids.npy", kind, shape) as ids,
            _open_array(folder / "log.npy", np.dtype(np.float16), shape) as log,
            torch.inference_mode(),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            for window in windows:
                logits = teacher(input_ids=window[None].to(device), use_cache=False).logits[0]
                best, values = top_logits(logits, k)
                ids.write(best.cpu().numpy().astype(kind).tobytes())
                log.write(values.cpu().numpy().astype(np.float16).tobytes())
                reporter.advance()

    try:
        build_once(cached_folder(key), build)
    except OSError as error:
        raise OutputError(
            f"the teacher's logits cannot be written to {cached_folder(key).parent}: {error.strerror}",
            hint="free some space, or choose another cache with SECATEUR_CACHE",
        ) from error
    return open_cache(key)


def _open_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> BinaryIO:
    """A new .npy file, its header written, its numbers still to come."""
    file = path.open("wb")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    return file
