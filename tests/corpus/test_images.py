"""Images of a folder."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from secateur.corpus.images import load_images
from secateur.errors import CalibrationError, MissingExtraError


def processor(images, return_tensors):
    assert return_tensors == "pt"
    assert images.mode == "RGB"
    return {"pixel_values": torch.tensor(np.array(images), dtype=torch.float32).permute(2, 0, 1)[None]}


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the extra 'images' is not installed")
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(["b.png", "a.png", "sub/c.png"]):
        image.new("L", (4, 4), number * 10).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_come_in_the_order_of_their_paths(folder):
    found = load_images(folder, processor)
    assert [float(inputs["pixel_values"][0, 0, 0, 0]) for inputs in found] == [10, 0, 20]
    assert len(load_images(folder, processor, 2)) == 2


def test_too_few_images(folder):
    with pytest.raises(CalibrationError, match="4 needed, 3 there"):
        load_images(folder, processor, 4)


def test_a_broken_image_is_named(folder):
    (folder / "a.png").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"a\.png"):
        load_images(folder, processor)


def test_no_such_folder(tmp_path):
    with pytest.raises(CalibrationError, match="no such folder"):
        load_images(tmp_path / "none", processor)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        load_images(tmp_path, processor)
    assert "secateur[images]" in caught.value.hint
