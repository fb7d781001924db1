"""Recovery block by block: errors fall, one block is in memory, embeddings and head are not touched."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateur
from secateur.corpus.windows import windows
from secateur.engine.activations import ActivationStore
from secateur.engine.block_training import decay
from secateur.engine.stream import BlockStream
from secateur.measure.model import load_model
from secateur.measure.perplexity import perplexity
from secateur.progress import Reporter
from secateur.recovery.blocks import BlockRecovery
from secateur.recovery.data import split
from tests.models import save_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dense(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and 12 others. " * 12)
    return save_tiny(tmp_path / "dense", "llama", num_hidden_layers=3, tie_word_embeddings=False)


@pytest.fixture
def pruned(dense):
    secateur.prune(dense, dense.parent / "pruned", method="magnitude", evaluate=False, verify=False)
    return dense.parent / "pruned"


def run(model, out="out", **changes):
    values = {"mode": "blocks", "sequence_length": 32, "evaluate": False, "verify": False, **changes}
    return secateur.recover(model, model.parent / out, data=str(model.parent / "text.txt"), **values)


def test_errors_fall_and_zeros_stay(pruned):
    result = run(pruned, learning_rate=3e-3, epochs=6, verify=True)
    errors = result.training["block_errors"]
    assert sorted(errors) == ["0", "1", "2"]
    for before, after in errors.values():
        assert 0 < after < 0.8 * before
    assert result.verified
    before, after = (load_file(pruned.parent / name / "model.safetensors") for name in ("pruned", "out"))
    changed = set()
    for key, weight in before.items():
        assert torch.equal((weight == 0) & (weight.ndim == 2), (after[key] == 0) & (weight.ndim == 2)), key
        if not torch.equal(weight, after[key]):
            changed.add(key)
    inside = {key for key in before if key.startswith("model.layers.")}
    assert changed == inside, "all of the blocks learns, norms as well, and nothing else"
    for key in before.keys() - inside:
        assert before[key].numpy().tobytes() == after[key].numpy().tobytes()


def test_perplexity_gets_nearer_to_the_dense_model(pruned):
    result = run(pruned, learning_rate=3e-3, epochs=6)
    text = str(pruned.parent / "text.txt")
    away = {}
    for name in ("dense", "pruned", "out"):
        found = secateur.evaluate(pruned.parent / name, data=text, sequence_length=32)
        away[name] = found.nll_per_token
    assert abs(away["out"] - away["dense"]) < abs(away["pruned"] - away["dense"])
    assert result.training["tokens"] == 6 * len(_windows(result)) * 32


def _windows(result):
    return range(int(result.protocol["data"].split("; ")[1].split()[0]) - int(result.protocol["held_out"].split()[0]))


def test_one_block_is_in_memory(pruned, monkeypatch):
    most, outside = [0], [0]

    def look(stream):
        here = {
            int(name.split(".")[2])
            for name, parameter in stream.model.named_parameters()
            if name.startswith("model.layers.") and not parameter.is_meta
        }
        most[0] = max(most[0], len(here))
        beside = [n for n, p in stream.model.named_parameters() if not p.is_meta and not n.startswith("model.layers.")]
        outside[0] = max(outside[0], len(beside)) if here else outside[0]
        return here

    def watched(owner, name):
        original = getattr(owner, name)

        def wrapper(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            here = look(self)
            assert not (here and name == "_dense_outputs"), "the dense block is gone before the student's comes"
            return result

        monkeypatch.setattr(owner, name, wrapper)

    watched(BlockStream, "_install")
    watched(BlockRecovery, "_error")
    watched(BlockRecovery, "_dense_outputs")
    run(pruned)
    assert most[0] == 1
    assert outside[0] == 0


def test_a_model_whose_teacher_is_its_equal_stays_what_it_is(dense, tmp_path):
    teacher = shutil.copytree(dense, tmp_path / "equal")
    # The same tensors in another file: a model is not taken as its own teacher.
    save_file(load_file(dense / "model.safetensors"), teacher / "model.safetensors", {"format": "pt", "note": "equal"})
    result = run(dense, dense=True, teacher=str(teacher), compute_dtype="float32")
    for pair in result.training["block_errors"].values():
        assert max(pair) < 1e-6
    before, after = (load_file(dense.parent / name / "model.safetensors") for name in ("dense", "out"))
    for key, weight in before.items():
        # Adam divides by its gradient: even noise moves a weight, by the learning rate at most, every step.
        assert float((after[key] - weight).abs().max()) < 0.01


def test_budget_counts_windows_times_epochs(pruned):
    result = run(pruned, tokens=32 * 12, epochs=3)
    assert result.training["tokens"] == 32 * 12


def test_learning_rate_warms_up_and_decays_to_nearly_zero():
    rates = [decay(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == 1.0
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.05
    assert decay(0, 1) > 0


def test_spilled_activations_change_nothing(pruned, monkeypatch):
    run(pruned, "kept")
    monkeypatch.setattr("secateur.verbs.teach_blocks.activation_limit", lambda _: 0)
    monkeypatch.setattr("secateur.engine.activations.MINIMUM_BYTES", 0)
    spilled = []
    original = ActivationStore.park
    monkeypatch.setattr(
        ActivationStore, "park", lambda self, watcher: (original(self, watcher), spilled.append(self.spilled_bytes))[0]
    )
    run(pruned, "spilled")
    assert max(spilled) > 0
    names = ("kept", "spilled")
    weights = [(pruned.parent / name / "model.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1]


def test_losses_and_costs_are_told(pruned):
    """The streamed losses are those of the stock model on the same windows, and the cost is told before the work."""
    notes = []
    reporter = Reporter()
    reporter.note = notes.append
    result = run(pruned, held_out=0.3, epochs=2, learning_rate=3e-3, reporter=reporter)
    assert any("s per 1,000 tokens" in note and "3 blocks" in note for note in notes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pruned)
    cut = windows((pruned.parent / "text.txt").read_text(), tokenizer, 32)
    parts = split(len(cut), 0.3, shuffle=False, seed=0)
    for when, folder in (("_before", pruned), ("", pruned.parent / "out")):
        model = load_model(folder, device="cpu", dtype="float32")
        for name, part in (("held_out_loss", parts.held_out), ("trained_text_loss", parts.train)):
            wanted = perplexity(model, cut[part[:16]]).nll_per_token
            assert result.training[name + when] == pytest.approx(wanted, rel=1e-5)
    gap = result.training["held_out_loss"] - result.training["trained_text_loss"]
    assert result.training["generalisation_gap"] == pytest.approx(gap)
