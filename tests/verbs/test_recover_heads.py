"""`recover` with labels and embeddings: heads that learn, and zeros that stay under other names."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import secateur
from tests.models import save_tiny
from tests.verbs.recovering import check_like_the_source, loads, tensors

pytestmark = pytest.mark.usefixtures("cache")

GOOD, BAD = ("good", "nice", "fine", "kind"), ("evil", "ugly", "poor", "sad!")


def _texts(path: Path, count: int, seed: int, names: bool = False) -> Path:
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        words = [chance.choice((GOOD, BAD)[number % 2]) for _ in range(chance.randint(3, 6))]
        label: Any = ("bad", "good")[1 - number % 2] if names else number % 2
        rows.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize(
    ("family", "architecture", "names"),
    [("bert", "BertForSequenceClassification", True), ("llama", "LlamaForSequenceClassification", False)],
)
def test_classifier_from_base_to_recovered(
    family: str, architecture: str, names: bool, root: Path, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", family)
    train, test = _texts(tmp_path / "train.jsonl", 160, 1, names), _texts(tmp_path / "test.jsonl", 50, 2, names)
    common = {"data": str(train), "evaluate": False, "verify": False, "learning_rate": 5e-3, "batch_size": 8}

    def accuracy(folder: Path) -> float:
        return float(secateur.evaluate(folder, data=None, files=[test]).accuracy["test.jsonl"])

    trained = secateur.recover(base, tmp_path / "dense", dense=True, epochs=4, **common)
    assert trained.protocol["loss"] == "labels"
    assert trained.training["held_out_loss"] < 0.3 < 0.6 < trained.training["held_out_loss_before"]
    model = loads(tmp_path / "dense", architecture)
    assert model.config.num_labels == 2
    if names:
        assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.pad_token_id == 0
    assert accuracy(tmp_path / "dense") > 0.95

    secateur.prune(
        tmp_path / "dense", tmp_path / "pruned", method="magnitude", sparsity=0.8, evaluate=False, verify=False
    )
    ways = [("labels", "full"), ("kd", "full")] if names else [("kd", "lora"), ("auto", "norms-and-biases")]
    for loss, mode in ways:
        out = tmp_path / f"{loss}-{mode}"
        result = secateur.recover(tmp_path / "pruned", out, loss=loss, mode=mode, epochs=2, **common)
        assert result.protocol["loss"] == ("labels" if loss == "auto" else loss)
        assert (result.teacher is not None) == (loss == "kd")
        assert check_like_the_source(tmp_path / "pruned", out)
        assert result.sparsity == pytest.approx(0.8, abs=0.01)
        loads(out, architecture)
        if mode == "full":
            assert accuracy(out) > 0.95
        assert result.training["held_out_loss"] <= result.training["held_out_loss_before"] + 1e-3


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_new_head_on_a_pruned_body(architecture: str, mode: str, root: Path, tmp_path: Path) -> None:
    """A body that was pruned before it had a head keeps its zeros under the names of the new model."""
    save_tiny(tmp_path / "masked", "bert")
    body = getattr(transformers, architecture).from_pretrained(tmp_path / "masked")
    shutil.copytree(tmp_path / "masked", tmp_path / "body", ignore=shutil.ignore_patterns("*.safetensors"))
    body.save_pretrained(tmp_path / "body")
    secateur.prune(tmp_path / "body", tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    data = _texts(tmp_path / "train.jsonl", 60, 1)
    result = secateur.recover(
        tmp_path / "pruned",
        tmp_path / "out",
        data=str(data),
        mode=mode,
        learning_rate=3e-3,
        evaluate=False,
        verify=False,
    )
    loads(tmp_path / "out", "BertForSequenceClassification")
    old, new = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    compared = 0
    for key, (_, weight) in old.items():
        if "encoder.layer" in key and weight.ndim == 2:
            made = new["bert." + key.removeprefix("bert.")][1]
            assert torch.equal(made == 0, weight == 0), key
            compared += 1
    assert compared == 12
    assert result.before.sparsity == result.after.sparsity == result.sparsity == pytest.approx(0.5, abs=0.01)
    assert result.zeros_held == sum(int((weight == 0).sum()) for _, weight in old.values() if weight.ndim == 2)


def test_encoder_learns_from_its_dense_self(root: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "masked", "bert")
    body = transformers.BertModel.from_pretrained(tmp_path / "masked")
    shutil.copytree(tmp_path / "masked", tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    body.save_pretrained(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    chance = random.Random(4)
    words = [*GOOD, *BAD, "tree", "house", "river", "cloud"]
    texts = [" ".join(chance.choices(words, k=chance.randint(4, 9))) for _ in range(200)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    result = secateur.recover(
        tmp_path / "pruned", tmp_path / "out", data=str(tmp_path / "texts.txt"), evaluate=False, verify=False,
        epochs=6, learning_rate=2e-3, batch_size=16,
    )  # fmt: skip
    assert result.protocol["loss"] == "features"
    losses = [value for _, value in result.training["losses"]]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert check_like_the_source(tmp_path / "pruned", tmp_path / "out")

    def apart(folder: Path) -> float:
        """Mean of 1 - cosine to the dense model's embedding, text by text, without padding."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ours, dense = loads(folder, "BertModel").eval(), loads(tmp_path / "dense", "BertModel").eval()
        total = 0.0
        with torch.no_grad():
            for text in texts[:30]:
                inputs = {"input_ids": tokenizer(text, return_tensors="pt").input_ids}
                sides = [model(**inputs).last_hidden_state[0].mean(0) for model in (ours, dense)]
                total += 1 - float(torch.cosine_similarity(*sides, dim=0))
        return total / 30

    assert apart(tmp_path / "out") < 0.6 * apart(tmp_path / "pruned")
