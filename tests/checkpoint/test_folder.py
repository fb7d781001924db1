"""A result appears whole or not at all, and nothing of the user's is lost on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from secateur.checkpoint.folder import OutputFolder, copy_side_files
from secateur.checkpoint.ledger import LEDGER
from secateur.errors import DiskSpaceError, OutputError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def model_at(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)
    return folder


def test_nothing_is_written_before_prepare_and_all_appears_at_commit(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "a" / "out")
    assert not list(tmp_path.iterdir())
    with folder:
        assert folder.partial == tmp_path / "a" / "out.partial"
        (folder.partial / "config.json").write_text("new")
        (folder.partial / LEDGER).write_text("{}")
        assert not folder.out.exists()
        assert folder.commit() == folder.out
    assert tree(tmp_path) == {"a/out/config.json": b"new"}


def test_a_run_that_fails_keeps_its_work_for_resume(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:  # left without commit, as an error would
        (folder.partial / "work").write_text("1")
    with pytest.raises(OutputError) as caught:
        OutputFolder(tmp_path / "out")
    assert "out.partial" in caught.value.message
    assert "--resume" in caught.value.hint
    with OutputFolder(tmp_path / "out", resume=True) as folder:
        assert (folder.partial / "work").read_text() == "1"
    with OutputFolder(tmp_path / "out", overwrite=True) as folder:
        assert not (folder.partial / "work").exists()
        folder.discard()
    assert not list(tmp_path.iterdir())


def test_resume_without_a_partial_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing to resume"):
        OutputFolder(tmp_path / "out", resume=True)


def test_an_existing_result_needs_overwrite(tmp_path: Path) -> None:
    out = model_at(tmp_path / "out")
    with pytest.raises(OutputError) as caught:
        OutputFolder(out)
    assert "--overwrite" in caught.value.hint
    before = tree(out)
    with OutputFolder(out, overwrite=True) as folder:
        assert tree(out) == before  # untouched until the end
        (folder.partial / "config.json").write_text("new")
        folder.commit()
    assert tree(tmp_path) == {"out/config.json": b"new"}


def test_overwrite_replaces_models_only(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a model"):
        OutputFolder(tmp_path / "thesis", overwrite=True)


def test_overwrite_never_takes_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model_at(tmp_path / "out")
    monkeypatch.chdir(out / "sub")
    with pytest.raises(OutputError, match="current folder"):
        OutputFolder(out, overwrite=True)


def test_a_failed_rename_restores_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model_at(tmp_path / "out")
    before = tree(out)
    folder = OutputFolder(out, overwrite=True)
    folder.prepare()
    (folder.partial / "work").write_text("1")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == folder.partial:
            raise PermissionError(13, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be renamed"):
        folder.commit()
    assert tree(out) == before
    assert (folder.partial / "work").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_kill_while_replacing_loses_neither_the_old_nor_the_new(tmp_path: Path, resume: bool) -> None:
    out = model_at(tmp_path / "out")
    folder = OutputFolder(out, overwrite=True)
    folder.prepare()
    (folder.partial / "config.json").write_text("new")
    out.rename(folder._aside)  # killed right here
    folder.release()
    after = OutputFolder(out, overwrite=True, resume=resume)
    after.prepare()
    if resume:
        after.commit()
        assert tree(tmp_path) == {"out/config.json": b"new"}
    else:
        assert tree(out) == {"config.json": b"old", "sub/file": b"old"}


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        model_at(tmp_path / "out")
        with pytest.raises(OutputError, match="appeared during the run"):
            folder.commit()
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_out_and_model_must_not_overlap(tmp_path: Path) -> None:
    model = model_at(tmp_path / "model")
    for out in (model, model / "out", model / "sub" / "out", tmp_path / "other" / ".." / "model" / "x"):
        with pytest.raises(OutputError, match="model"):
            OutputFolder(out, overwrite=True, sources=[model])
    with pytest.raises(OutputError, match="inside the output folder"):
        OutputFolder(model, overwrite=True, sources=[model_at(model / "deep")])
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(OutputError, match="inside the model"):
        OutputFolder(link / "out", sources=[model])


def test_files_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "b.partial").write_text("x")
    for out, overwrite in [("file", False), ("file", True), ("file/out", False), ("b", True)]:
        with pytest.raises(OutputError):
            OutputFolder(tmp_path / out, overwrite=overwrite)
    with pytest.raises(OutputError):
        OutputFolder("/", overwrite=True)


def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere, so the answer is given here
    with pytest.raises(OutputError, match="not writable"):
        OutputFolder(tmp_path / "out")


def test_two_runs_do_not_share_a_partial_folder(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"), pytest.raises(OutputError, match="another run"):
        OutputFolder(tmp_path / "out", resume=True).prepare()
    OutputFolder(tmp_path / "out", resume=True).prepare()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    code = "import os, sys; from secateur.checkpoint.folder import OutputFolder; "
    code += "OutputFolder(sys.argv[1]).prepare(); os.kill(os.getpid(), 9)"
    path = [str(Path(part).resolve()) for part in sys.path if part]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}", str(tmp_path / "out")], check=False
    )
    assert (tmp_path / "out.partial").is_dir()
    OutputFolder(tmp_path / "out", resume=True).prepare()


def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "not" / "yet" / "out")
    folder.require_space(1)
    with pytest.raises(DiskSpaceError, match="1,000,000,000,000,000,000 bytes"):
        folder.require_space(10**18)
    assert not list(tmp_path.iterdir())


def test_side_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    wanted = ["tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json", "tokenizer.model"]
    wanted += ["preprocessor_config.json", "LICENSE", "1_Pooling/config.json", "model.json"]
    unwanted = ["config.json", "secateur.json", "README.md", "model.safetensors", "model.safetensors.index.json"]
    unwanted += ["pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_x.py", "training_args.bin", "a.pkl"]
    unwanted += [".git/config", ".source.json", "onnx/config.json", "original/params.json", "checkpoint-10/x.json"]
    source, out = tmp_path / "in", tmp_path / "out"
    for name in wanted + unwanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    assert sorted(copy_side_files(source, out)) == sorted(wanted)
    assert tree(out) == {name: name.encode() for name in sorted(wanted)}
