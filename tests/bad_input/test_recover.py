"""Bad input to `recover`: one clear line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    WeightValueError,
)
from secateur.verbs import teach
from tests.models import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("dense", "llama"), ("encoder", "bert")):
        save_tiny(folder / name, family)
        secateur.prune(folder / name, folder / f"{name}-pruned", method="magnitude", evaluate=False, verify=False)
    save_tiny(folder / "vit", "vit")
    save_tiny(folder / "t5", "t5")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    rows = [{"text": f"a text about thing {i}", "label": i % 2} for i in range(40)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def classifier(root: Path) -> Path:
    secateur.recover(
        root / "encoder", root / "classifier", dense=True, data=str(root / "labels.jsonl"), tokens=600, evaluate=False,
        verify=False,
    )  # fmt: skip
    secateur.prune(root / "classifier", root / "classifier-pruned", method="magnitude", evaluate=False, verify=False)
    return root / "classifier-pruned"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))


def _listing(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(kind: type[SecateurError], words: str, model: Any, out: Path, **options: Any) -> SecateurError:
    """Exactly this error, one line, with a hint, exit status 2, and no file made or changed anywhere near."""
    before = _listing(out.parent)
    options = {"evaluate": False, "verify": False, **options}
    with pytest.raises(SecateurError) as caught:
        secateur.recover(model, out, **options)
    error = caught.value
    assert type(error) is kind, error
    for word in words.split("|"):
        assert word in error.message + " " + error.hint, (error.message, error.hint)
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint
    assert error.hint
    assert _listing(out.parent) == before
    assert not out.with_name(out.name + ".partial").exists()
    return error


def text(root: Path, **changes: Any) -> dict[str, Any]:
    return {"data": str(root / "text.txt"), "sequence_length": 32, "batch_size": 2, **changes}


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (UnknownNameError, "mode 'ful'|did you mean 'full'", {"mode": "ful"}),
        (UnknownNameError, "mode|'block'|did you mean 'blocks'", {"mode": "block"}),
        (UnknownNameError, "loss|'dk'|known: auto", {"loss": "dk"}),
        (UnknownNameError, "loss|'kd+hiden'|did you mean 'kd+hidden'", {"loss": "kd+hiden"}),
        (UnknownNameError, "setting|learningrate|did you mean 'learning_rate'", {"learningrate": 1}),
        (UsageError, "gradient_checkpointing|sometimes", {"gradient_checkpointing": "sometimes"}),
        (UsageError, "compute_dtype|int8", {"compute_dtype": "int8"}),
        (UsageError, "tokens is 0", {"tokens": 0}),
        (UsageError, "batch_size is -1", {"batch_size": -1}),
        (UsageError, "rank is 0", {"mode": "lora", "rank": 0}),
        (UsageError, "top_k is 0", {"top_k": 0}),
        (UsageError, "epochs is 0", {"epochs": 0}),
        (UsageError, "minutes is 0", {"minutes": 0}),
        (UsageError, "learning_rate is -0.1", {"learning_rate": -0.1}),
        (UsageError, "learning_rate is nan", {"learning_rate": float("nan")}),
        (UsageError, "held_out is 1", {"held_out": 1.0}),
        (UsageError, "held_out is -0.1", {"held_out": -0.1}),
        (UsageError, "both tokens and minutes", {"tokens": 10**6, "minutes": 3}),
        (UsageError, "blocks|minutes|--tokens", {"mode": "blocks", "minutes": 3}),
        (UsageError, "blocks|loss", {"mode": "blocks", "loss": "kd"}),
        (UsageError, "device|warp", {"device": "warp"}),
        (UsageError, "sequence length 300|256", {"sequence_length": 300}),
        (UsageError, "tokens 63|no step|2 x 32|64", {"tokens": 63}),
        (UsageError, "tokens 127|no step", {"mode": "blocks", "tokens": 127}),
        (UsageError, "--loss labels|language model", {"loss": "features"}),
        (CalibrationError, "no labels|--data", {"loss": "labels", "data": "builtin"}),
        (CalibrationError, "missing.txt", {"data": "missing.txt"}),
        (CalibrationError, "too few", {"sequence_length": 128, "held_out": 0.99}),
        (UnknownNameError, "training argument|learning_rat|did you mean 'learning_rate'",
         {"trainer": {"learning_rat": "1"}}),
        (UsageError, "--trainer|weight_decay|much", {"trainer": {"weight_decay": "much"}}),
        (UsageError, "--trainer|optim|sgdd", {"trainer": {"optim": "sgdd"}}),
        (UsageError, "--trainer max-steps|decided by secateur|flags of recover", {"trainer": {"max-steps": "3"}}),
        (UsageError, "gradient_accumulation_steps 8|batch size of 2|--batch-size",
         {"trainer": {"gradient_accumulation_steps": "8"}}),
        (UsageError, "--trainer output_dir|decided by secateur", {"trainer": {"output_dir": "x"}}),
        (UsageError, "--trainer learning_rate|decided by secateur", {"trainer": {"learning_rate": "1e-3"}}),
        (UsageError, "--trainer logging_strategy|decided", {"trainer": {"logging_strategy": "no"}}),
        (UsageError, "--trainer eval_steps|no effect", {"trainer": {"eval_steps": "3"}}),
        (UsageError, "--loss lm has no teacher", {"loss": "lm", "teacher": "dense"}),
        (UsageError, "--epochs|--tokens", {"epochs": 2}),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_request_that_makes_no_sense(
    root: Path, tmp_path: Path, kind: type[SecateurError], words: str, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(teach, "build_cache", lambda *a, **k: pytest.fail("the teacher was asked before"))
    if options.get("loss") == "features":
        words = "--loss features|a language model on text|kd or lm or kd+hidden"
    refused(kind, words, root / "dense-pruned", tmp_path / "out", **{**text(root), **options})


def test_model_from_which_units_were_removed(root: Path, tmp_path: Path) -> None:
    """It has no zeros, and that is as it should be; only a teacher of other shapes cannot be read into it."""
    small = tmp_path / "small"
    secateur.prune(
        root / "dense", small, structure="ffn", sparsity=0.2, round_to=1, method="magnitude", update=False,
        evaluate=False, verify=False,
    )  # fmt: skip
    words = "other shapes in the teacher|full or lora"
    refused(SourceError, words, small, tmp_path / "out", mode="blocks", **text(root))
    result = secateur.recover(small, tmp_path / "out", tokens=64, evaluate=False, verify=False, **text(root))
    assert result.zeros_held == 0


def test_model_without_zeros(root: Path, tmp_path: Path) -> None:
    refused(UsageError, "dense has no zeros|--dense", root / "dense", tmp_path / "out", **text(root))
    secateur.recover(
        root / "dense", tmp_path / "out", dense=True, loss="lm", tokens=64, evaluate=False, verify=False, **text(root)
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_model_that_is_not_there(root: Path, tmp_path: Path) -> None:
    refused(SourceError, "nothing", tmp_path / "nothing", tmp_path / "out", **text(root))


def test_teacher_with_another_vocabulary(root: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", vocab_size=130)
    told = {**text(root), "teacher": str(other)}
    refused(SourceError, "130|128|tokenizer", root / "dense-pruned", tmp_path / "out", **told)


def test_teacher_with_another_tokenizer(root: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(root / "dense", tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    told = {**text(root), "teacher": str(other)}
    refused(SourceError, "another tokenizer", root / "dense-pruned", tmp_path / "out", **told)


def test_teacher_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    pruned, out = root / "dense-pruned", tmp_path / "out"
    told = {**text(root), "teacher": str(tmp_path / "nowhere")}
    refused(SourceError, "teacher|nowhere", pruned, out, **told)
    other = save_tiny(tmp_path / "mistral", "mistral")
    told = {**text(root), "teacher": str(other), "mode": "blocks"}
    refused(SourceError, "MistralForCausalLM|LlamaForCausalLM", pruned, out, **told)
    for changes, loss, words in (
        ({"num_hidden_layers": 3}, "kd+hidden", "3 layers, the model 2"),
        ({"hidden_size": 64}, "kd+hidden", "64 hidden units, the model 32"),
    ):
        other = save_tiny(tmp_path / f"other-{next(iter(changes))}", "llama", **changes)
        refused(SourceError, words, pruned, out, **text(root), teacher=str(other), loss=loss)
        told = {**text(root), "teacher": str(other), "tokens": 64}
        secateur.recover(pruned, tmp_path / f"kd-{other.name}", loss="kd", evaluate=False, verify=False, **told)
    bare = Path(shutil.copytree(root / "dense", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    transformers.LlamaModel.from_pretrained(root / "dense").save_pretrained(bare)
    refused(SourceError, "LlamaModel|LlamaForCausalLM", pruned, out, **text(root), teacher=str(bare))


def test_no_teacher_is_known(root: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(root / "dense-pruned", tmp_path / "alone"))
    (alone / "secateur.json").unlink()
    for options in ({"loss": "kd"}, {"loss": "kd+hidden"}, {"mode": "blocks"}):
        refused(UsageError, "no teacher is known|--teacher", alone, tmp_path / "out", **text(root), **options)
    result = secateur.recover(alone, tmp_path / "lm", tokens=64, evaluate=False, verify=False, **text(root))
    assert result.protocol["loss"] == "lm"
    assert any("no teacher is known" in warning for warning in result.warnings)
    (alone / "secateur.json").write_text("{torn")
    refused(UsageError, "no teacher is known", alone, tmp_path / "out", **text(root), loss="kd")


def test_model_in_memory(root: Path, tmp_path: Path) -> None:
    """No file says what its dense model was: it must be named, or the text alone is learned."""
    model = tiny_model("llama")
    secateur.prune(model, method="magnitude", tokenizer=tiny_tokenizer(), evaluate=False, verify=False)
    out = tmp_path / "out"
    refused(UsageError, "needs its tokenizer|tokenizer=", model, out, **text(root))
    told = {**text(root), "tokenizer": tiny_tokenizer()}
    for options in ({"loss": "kd"}, {"mode": "blocks"}):
        refused(UsageError, "no teacher is known|no secateur.json|teacher=", model, out, **told, **options)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for mode in ("full", "blocks"):
        result = secateur.recover(
            model, tmp_path / mode, mode=mode, teacher=str(root / "dense"), tokens=512, evaluate=False, verify=True,
            **told,
        )  # fmt: skip
        assert result.verified
        assert result.zeros_held > 0
        assert result.protocol["teacher"] == "dense"
        made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / mode)
        for name, weight in made.named_parameters():
            if "proj" in name:
                assert torch.equal(weight == 0, before[name] == 0), name
        assert any(not torch.equal(weight, before[name]) for name, weight in made.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "full"]


def test_pruned_from_a_model_in_memory(root: Path, tmp_path: Path) -> None:
    """The result file can name no folder: that is told, and nothing is said to be missing that is there."""
    pruned = tmp_path / "pruned"
    secateur.prune(
        tiny_model("llama"), pruned, method="magnitude", tokenizer=tiny_tokenizer(), evaluate=False, verify=False
    )
    refused(UsageError, "was one in memory|--teacher", pruned, tmp_path / "out", **text(root), loss="kd")
    result = secateur.recover(pruned, tmp_path / "out", tokens=64, evaluate=False, verify=False, **text(root))
    assert result.protocol["loss"] == "lm"
    assert any("no teacher is known" in warning for warning in result.warnings)


def test_teacher_that_changed_since_it_was_pruned(root: Path, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", "llama")
    secateur.prune(dense, tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    shutil.rmtree(dense)
    refused(SourceError, "teacher|dense|--teacher", tmp_path / "pruned", tmp_path / "out", **text(root))
    save_tiny(dense, "llama", seed=1)
    refused(SourceError, "not the model any more|--teacher", tmp_path / "pruned", tmp_path / "out", **text(root))


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


def test_disk_that_fills_while_it_trains(root: Path, tmp_path: Path) -> None:
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
        command = [sys.executable, "-c", program, str(most), *told, *more]
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


def test_settings_that_nothing_looks_at(root: Path, tmp_path: Path) -> None:
    """They are named in a warning, and those that count are not."""
    told = text(root, tokens=128, evaluate=False, verify=False)
    for number, (changes, named) in enumerate(
        [
            ({"rank": 16, "loss": "lm", "top_k": 64}, {"--rank", "--top-k"}),
            ({"mode": "blocks", "tokens": 256, "save_minutes": 10.0, "gradient_checkpointing": "on"},
             {"--save-minutes", "--gradient-checkpointing"}),
            ({"mode": "lora", "rank": 4, "top_k": 8, "save_minutes": 3.0}, set()),
            ({"dense": True, "loss": "lm"}, {"--dense"}),
            ({"loss": "lm", "measure_data": "missing.txt", "files": ["missing.jsonl"]}, {"--measure-data", "--files"}),
        ]
    ):  # fmt: skip
        result = secateur.recover(root / "dense-pruned", tmp_path / f"out-{number}", **{**told, **changes})
        assert {line.split()[0] for line in result.warnings if "no effect" in line} == named


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
