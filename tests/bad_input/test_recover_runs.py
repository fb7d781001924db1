"""Bad input to `recover`, data, folders and numbers: one clear line, nothing lost; what is not used is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import secateur
from secateur.checkpoint import folder as folder_module
from secateur.errors import (
    CalibrationError,
    DiskSpaceError,
    MissingExtraError,
    OutputError,
    RunError,
    SecateurError,
    SourceError,
    UnsupportedModelError,
    UsageError,
    WeightValueError,
)
from secateur.verbs import teach
from tests.bad_input.recovering import refused, text
from tests.forking import Forking
from tests.models import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


def test_text_without_content(root: Path, tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.txt", "", "empty.txt|no text"),
        ("short.txt", "short", "32"),
        ("columns.jsonl", '{"sentence": "hello there"}', "columns.jsonl|line 1|text"),
        ("broken.jsonl", '{"text": "hello', "broken.jsonl|line 1"),
    ):
        (tmp_path / name).write_text(content)
        told = {**text(root), "data": str(tmp_path / name)}
        refused(CalibrationError, words, root / "dense-pruned", tmp_path / "out", **told)


def test_labels_that_are_wrong(root: Path, tmp_path: Path, classifier: Path) -> None:
    for number, (row, words) in enumerate(
        [
            ({"text": "hello there", "label": 2}, "line 2|label is 2|0 to 1"),
            ({"text": "hello there", "label": -1}, "line 2|-1"),
            ({"text": "hello there", "label": "grand"}, "line 2|'grand'"),
            ({"text": "hello there", "label": True}, "line 2|True"),
            ({"text": "hello there"}, "line 2|no column 'label'|text"),
            ({"sentence": "hello", "label": 1}, "line 2|no column 'text'|sentence"),
        ]
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"text": "one", "label": 0}) + "\n" + json.dumps(row))
        error = refused(CalibrationError, words, classifier, tmp_path / "out", data=str(path))
        assert str(path) in error.message
    (tmp_path / "none.jsonl").write_text("")
    refused(CalibrationError, "none.jsonl|no rows", classifier, tmp_path / "out", data=str(tmp_path / "none.jsonl"))
    refused(CalibrationError, "no labels", classifier, tmp_path / "out")


def test_loss_or_mode_that_does_not_suit_the_model(root: Path, tmp_path: Path, classifier: Path) -> None:
    labels, out = str(root / "labels.jsonl"), tmp_path / "out"
    refused(UsageError, "--loss lm|classifier|labels or kd", classifier, out, data=labels, loss="lm")
    told = {"data": labels, "loss": "kd", "teacher": str(root / "encoder")}
    refused(SourceError, "BertForMaskedLM|BertForSequenceClassification", classifier, out, **told)
    told = {"data": labels, "tokens": 1}
    refused(UsageError, "tokens 1|no step", classifier, out, **told)


def test_models_that_cannot_be_recovered(root: Path, tmp_path: Path) -> None:
    for name, words in (("vit", "ViTForImageClassification|pixel_values"), ("t5", "T5")):
        with pytest.raises(SecateurError) as caught:
            secateur.recover(root / name, tmp_path / "out", dense=True, evaluate=False, **text(root))
        assert caught.value.exit_code == 2
        assert type(caught.value) in (UnsupportedModelError, UsageError)
        for word in words.split("|"):
            assert word in caught.value.message
    assert not list(tmp_path.iterdir())


def test_minutes_that_allow_no_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach, "time_of_step", lambda *a: 7.0)
    told = text(root, minutes=0.1)
    refused(UsageError, "--minutes 0.1|no step|7.0 s", root / "dense-pruned", tmp_path / "out", **told)


def test_adapters_without_peft(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(teach, "build_cache", lambda *a, **k: pytest.fail("the teacher was asked before"))
    told = text(root, mode="lora")
    refused(MissingExtraError, "PEFT|secateur[recover]", root / "dense-pruned", tmp_path / "out", **told)


def test_disk_that_is_too_small(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full training needs room for checkpoints of weights and optimiser besides the result."""
    usage = shutil.disk_usage(tmp_path)
    weights = (root / "dense-pruned" / "model.safetensors").stat().st_size
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=3 * weights))
    refused(DiskSpaceError, f"{3 * weights:,}", root / "dense-pruned", tmp_path / "out", **text(root))
    told = text(root, mode="norms-and-biases", tokens=64)
    secateur.recover(root / "dense-pruned", tmp_path / "out", evaluate=False, verify=False, **told)


def test_disk_that_fills_while_it_trains(root: Path, forking: Forking, tmp_path: Path) -> None:
    """No file may grow past the weights: the optimiser's state cannot be written, and what was kept can be resumed."""
    pruned, out = root / "dense-pruned", tmp_path / "out"
    limit = 3 * (pruned / "model.safetensors").stat().st_size // 2
    program = (
        "import resource, sys; from secateur.cli.app import entry; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY)); entry()"
    )
    told = ["recover", str(pruned), "-o", str(out), "--data", str(root / "text.txt"), "--tokens", "320", "--quiet"]
    told += ["--sequence-length", "32", "--save-minutes", "1e-9", "--no-evaluate", "--no-verify"]

    def run(most: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = [forking.executable, "-c", program, str(most), *told, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    full = run(limit)
    assert full.returncode == 1, full.stderr
    assert "a checkpoint could not be written" in full.stderr
    assert "--resume" in full.stderr
    assert not out.exists()
    assert out.with_name("out.partial").is_dir()
    resumed = run(1 << 40, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "model.safetensors").is_file()


OF_A_MODE = ("rank", "top-k", "experts", "dim", "gradient-checkpointing", "save-minutes")


def test_settings_that_nothing_looks_at(root: Path, tmp_path: Path) -> None:
    """They are named in a warning, and those that count are not."""
    common = text(root, tokens=128, evaluate=False, verify=False)
    for number, (changes, named) in enumerate(
        [
            ({"rank": 16, "loss": "lm", "top_k": 64}, {"--rank", "--top-k"}),
            ({"mode": "blocks", "tokens": 256, "save_minutes": 10.0, "gradient_checkpointing": "on"},
             {"--save-minutes", "--gradient-checkpointing"}),
            ({"mode": "lora", "rank": 4, "top_k": 8, "save_minutes": 3.0}, set()),
            ({"mode": "norms-and-biases", "loss": "lm", "rank": 4, "experts": 2, "gradient_checkpointing": "off",
              "save_minutes": 3.0}, {"--rank", "--experts"}),
            ({"dense": True, "loss": "lm"}, {"--dense"}),
            ({"loss": "lm", "measure_data": "missing.txt", "files": ["missing.jsonl"]}, {"--measure-data", "--files"}),
        ]
    ):  # fmt: skip
        result = secateur.recover(root / "dense-pruned", tmp_path / f"out-{number}", **{**common, **changes})
        told = [line for line in result.warnings if "no effect" in line]
        assert {line.split()[0] for line in told} == named
        mode = changes.get("mode", "full")
        assert all(f"with --mode {mode}" in line for line in told if line.split()[0].strip("-") in OF_A_MODE), told


def test_settings_that_labels_do_not_look_at(root: Path, tmp_path: Path, classifier: Path) -> None:
    labels, out = str(root / "labels.jsonl"), tmp_path / "out"
    for loss in ("auto", "labels"):
        told = {"data": labels, "loss": loss, "teacher": str(root / "classifier")}
        refused(UsageError, "--loss labels has no teacher|--loss kd", classifier, out, **told)
    refused(UsageError, "both epochs and tokens", classifier, out, data=labels, epochs=2, tokens=600)
    refused(UsageError, "both epochs and minutes", classifier, out, data=labels, epochs=2, minutes=1)
    refused(UsageError, "sequence length 300|256", classifier, out, data=labels, sequence_length=300)
    told = {"data": labels, "tokens": 400, "top_k": 64, "rank": 16, "evaluate": False, "verify": False}
    result = secateur.recover(classifier, out, **told)
    assert {line.split()[0] for line in result.warnings if "no effect" in line} == {"--rank", "--top-k"}


def test_budget_that_is_more_than_the_text(root: Path, tmp_path: Path) -> None:
    """Blocks go through each window a fixed number of times: more tokens than that cannot be spent."""
    told = text(root, mode="blocks", tokens=10**6, epochs=1, evaluate=False, verify=False)
    result = secateur.recover(root / "dense-pruned", tmp_path / "out", **told)
    assert any("not the 1,000,000 of --tokens" in line for line in result.warnings)
    assert f"is {result.training['tokens']:,} tokens" in " ".join(result.warnings)


def test_the_dense_model_is_never_replaced(root: Path, tmp_path: Path) -> None:
    """Even where the run does not open it: its path is in the secateur.json of what was made from it."""
    dense = save_tiny(tmp_path / "dense", "llama")
    secateur.prune(dense, tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    told = text(root, loss="lm", tokens=64)
    words = "a model that is read, or that one which is read was made from"
    refused(OutputError, words, tmp_path / "pruned", dense, overwrite=True, **told)
    secateur.recover(tmp_path / "pruned", tmp_path / "once", evaluate=False, verify=False, **told)
    for place in (dense, tmp_path / "pruned"):
        refused(OutputError, words, tmp_path / "once", place, overwrite=True, **told)


def test_output_folder_that_cannot_be(root: Path, tmp_path: Path) -> None:
    pruned = Path(shutil.copytree(root / "dense-pruned", tmp_path / "pruned"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("precious")
    refused(OutputError, "there|exists|--overwrite", pruned, tmp_path / "there", **text(root))
    refused(OutputError, "not a model", pruned, tmp_path / "there", overwrite=True, **text(root))
    refused(OutputError, "inside the model", pruned, pruned / "out", **text(root))
    refused(OutputError, "nothing to resume", pruned, tmp_path / "out", resume=True, **text(root))
    (tmp_path / "left.partial").mkdir()
    (tmp_path / "left.partial" / "file").write_text("work")
    with pytest.raises(OutputError, match=r"left over"):
        secateur.recover(pruned, tmp_path / "left", **text(root))
    assert (tmp_path / "left.partial" / "file").read_text() == "work"


def test_weights_that_are_not_finite(root: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(root / "dense-pruned")
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.model.embed_tokens.weight[40, 3] = value
        shutil.rmtree(tmp_path / "poisoned", ignore_errors=True)
        model.save_pretrained(tmp_path / "poisoned")
        tiny_tokenizer().save_pretrained(tmp_path / "poisoned")
        told = text(root, loss="lm")
        refused(WeightValueError, "model.embed_tokens.weight", tmp_path / "poisoned", tmp_path / "out", **told)


@pytest.mark.parametrize("loss", ["lm", "kd+hidden"])
def test_loss_that_is_not_finite(root: Path, tmp_path: Path, loss: str) -> None:
    """Weights may be finite and too large all the same."""
    model = transformers.LlamaForCausalLM.from_pretrained(root / "dense-pruned")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.masked_fill_(model.model.layers[0].mlp.up_proj.weight != 0, 3e38)
    model.save_pretrained(tmp_path / "poisoned")
    tiny_tokenizer().save_pretrained(tmp_path / "poisoned")
    with pytest.raises(RunError, match="not finite at step 1; there is no checkpoint|gives NaN") as caught:
        secateur.recover(
            tmp_path / "poisoned", tmp_path / "out", loss=loss, evaluate=False, held_out=0.0, **text(root),
            **({} if loss == "lm" else {"teacher": str(root / "dense")}),
        )  # fmt: skip
    assert caught.value.exit_code == 1
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
