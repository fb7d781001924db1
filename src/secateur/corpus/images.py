"""Images of a folder as inputs of a vision model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.errors import CalibrationError, MissingExtraError

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def load_images(
    folder: str | Path, image_processor: Callable[..., Any], samples: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Read the images of a folder and its subfolders, in the order of their paths.

    Args:
        image_processor: the model's own; called with ``images=`` and ``return_tensors="pt"``.
        samples: the first so many images; None takes all.

    Returns:
        One dict of tensors an image, each with a leading batch axis of 1.

    Raises:
        CalibrationError: when the folder is missing, holds too few images, or one cannot be read (it is named).
        MissingExtraError: without Pillow.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CalibrationError(f"no such folder of images: {folder}", hint="vision models calibrate on images")
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("images need the extra 'images'", hint="run: pip install 'secateur[images]'") from None
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    wanted = samples or 1
    if len(paths) < wanted:
        raise CalibrationError(
            f"{folder} holds too few images: {wanted} needed, {len(paths)} there",
            hint=f"add images ({', '.join(sorted(_SUFFIXES))})" + (f" or use --samples {len(paths)}" if paths else ""),
        )
    inputs = []
    for path in paths[: samples or None]:
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except OSError as error:  # Pillow's own errors are OSErrors
            raise CalibrationError(f"{path} is not a readable image: {error}") from None
        inputs.append(dict(image_processor(images=pixels, return_tensors="pt")))
    return inputs
