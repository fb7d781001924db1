"""Bad input to `recover`, what is asked and by which teacher: one clear line, exit status 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from secateur.errors import (
    CalibrationError,
    SecateurError,
    SourceError,
    UnknownNameError,
    UsageError,
)
from secateur.verbs import teach
from tests.bad_input.recovering import refused, text
from tests.models import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


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
        (UsageError, "tokens 31|no step", {"mode": "blocks", "tokens": 31}),
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
        words = "--loss features|a language model on text|kd+lm or kd or lm or kd+hidden"
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
