"""A file appears whole or not at all, and nothing that stood there is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.checkpoint.file import OutputFile
from secateur.errors import DiskSpaceError, OutputError


def test_it_appears_only_when_it_is_committed(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "new" / "x.gguf", suffix=".gguf") as file:
        file.partial.write_bytes(b"whole")
        assert not file.out.exists()
        file.commit()
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("x.gguf", b"whole")]


def test_a_failed_run_leaves_nothing_and_what_was_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    with OutputFile(out, suffix=".gguf", overwrite=True) as file:
        file.partial.write_bytes(b"half")  # and is never committed
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.gguf", b"old")]
    with OutputFile(out, suffix=".gguf", overwrite=True) as file:
        file.partial.write_bytes(b"new")
        file.commit()
    assert out.read_bytes() == b"new"


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"old")
    (tmp_path / "folder.gguf").mkdir()
    model = tmp_path / "model"
    model.mkdir()
    for out, message in (
        (tmp_path / "x.gguf", "exists"),
        (tmp_path / "folder.gguf", "is a folder"),
        (tmp_path / "x.bin", "does not end in .gguf"),
        (tmp_path / "x.gguf" / "y.gguf", "is a file"),
        (model / "x.gguf", "is inside the model"),
    ):
        with pytest.raises(OutputError, match=message) as caught:
            OutputFile(out, suffix=".gguf", sources=[model])
        assert caught.value.hint
    with pytest.raises(DiskSpaceError, match="needs 1,"):
        OutputFile(tmp_path / "z.gguf", suffix=".gguf").require_space(10**18)


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    (tmp_path / "x.gguf.partial").write_bytes(b"of a killed run")
    with OutputFile(out, suffix=".gguf") as file:
        assert not file.partial.exists()
        with pytest.raises(OutputError, match="another run"), OutputFile(out, suffix=".gguf"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    with OutputFile(out, suffix=".gguf") as file:
        file.partial.write_bytes(b"ours")
        out.write_bytes(b"theirs")
        with pytest.raises(OutputError, match="appeared"):
            file.commit()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.gguf", b"theirs")]


def test_a_file_does_not_replace_what_it_is_made_of(tmp_path: Path) -> None:
    source = tmp_path / "x.gguf"
    source.write_bytes(b"dense")
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    for out in (source, link):
        with pytest.raises(OutputError, match="the model itself"):
            OutputFile(out, suffix=".gguf", overwrite=True, sources=[source])
