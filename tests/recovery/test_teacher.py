"""The teacher's cache says what the teacher says, is found by its content only, and damage to it is one clear line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import secateur
from secateur.errors import SecateurError
from secateur.progress import Reporter
from secateur.recovery import teacher as module
from secateur.recovery.losses import distillation
from secateur.recovery.teacher import build_cache, cache_key, cached_folder, open_cache, top_logits
from secateur.verbs import teach
from tests.models import VOCABULARY, calibration_for, save_tiny, tiny_model

K = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def filled():
    """A key and windows whose answers are in the cache."""
    windows = calibration_for("llama", rows=5, length=20)
    key = cache_key("weights", windows, K, torch.float32)
    build_cache(key, tiny_model("llama"), windows, K, dtype=torch.float32, reporter=Reporter())
    return key, windows


def test_top_logits_are_the_largest_of_the_log_softmax():
    logits = torch.randn(3, 200, 50, generator=torch.Generator().manual_seed(0))
    ids, logs = top_logits(logits, K)
    expected, order = logits.double().log_softmax(-1).sort(-1, descending=True)
    assert torch.equal(ids, order[..., :K])
    torch.testing.assert_close(logs.double(), expected[..., :K], rtol=1e-6, atol=1e-6)
    assert top_logits(logits, 1000)[0].shape == (3, 200, 50)


def test_cache_says_what_the_teacher_says(filled):
    key, windows = filled
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    kept = open_cache(key)
    assert kept.ids.dtype == np.uint16
    for index, window in enumerate(windows):
        with torch.no_grad():
            ids, logs = top_logits(teacher(input_ids=window[None]).logits[0], K)
            ours = student(input_ids=window[None]).logits[0]
        cached_ids, cached_logs = kept[index]
        assert torch.equal(cached_ids, ids)
        assert torch.equal(cached_logs, logs.half().float())
        live, stored = distillation(ours, ids, logs), distillation(ours, cached_ids, cached_logs)
        assert float(stored) == pytest.approx(float(live), rel=2e-3)
        assert float(live) > 0.01


def test_classes_above_16_bits_are_kept_whole():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.randn(1, 3, 70_000, generator=torch.Generator().manual_seed(0)))
            self.logits.data[..., 69_999] = 30.0
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=70_000))

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.logits)

    windows = torch.zeros(1, 3, dtype=torch.int64)
    kept = build_cache("wide", Wide(), windows, 4, dtype=torch.float32, reporter=Reporter())
    assert kept.ids.dtype == np.int32
    assert kept[0][0][:, 0].tolist() == [69_999] * 3


def test_key_changes_with_everything_that_decides_the_content():
    windows = calibration_for("llama", rows=4, length=10)
    changed = windows.clone()
    changed[3, 9] += 1
    keys = [
        cache_key("a", windows, 8, torch.float32),
        cache_key("b", windows, 8, torch.float32),
        cache_key("a", changed, 8, torch.float32),
        cache_key("a", windows.reshape(5, 8), 8, torch.float32),
        cache_key("a", windows[:3], 8, torch.float32),
        cache_key("a", windows, 9, torch.float32),
        cache_key("a", windows, 8, torch.bfloat16),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", windows.clone(), 8, torch.float32) == keys[0]


def test_teacher_that_fails_leaves_no_cache():
    class Failing(torch.nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **inputs):
            raise RuntimeError("out of memory")

    windows = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="out of memory"):
        build_cache("failing", Failing(), windows, 4, dtype=torch.float32, reporter=Reporter())
    assert not cached_folder("failing").exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickle(path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (path.parent / "sprung",))

    with path.open("wb") as file:
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)


def _nonsense(path: Path) -> None:
    path.write_bytes(b"nonsense" * 100)


def _other_shape(path: Path) -> None:
    np.save(path, np.load(path)[:, :1])


@pytest.mark.parametrize("damage", [_truncate, _empty, _pickle, _nonsense, _other_shape, Path.unlink])
@pytest.mark.parametrize("name", ["ids.npy", "log.npy"])
def test_damage_is_named_and_nothing_is_run(filled, damage, name):
    key, _ = filled
    damage(cached_folder(key) / name)
    with pytest.raises(SecateurError) as caught:
        open_cache(key)
    assert str(cached_folder(key)) in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert not (cached_folder(key) / "sprung").exists()


@pytest.fixture
def pruned(tmp_path):
    folder = save_tiny(tmp_path / "dense", "llama")
    secateur.prune(folder, tmp_path / "pruned", method="magnitude", evaluate=False, verify=False)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    return tmp_path / "pruned"


def run(pruned, out, **changes):
    values = {"sequence_length": 32, "tokens": 128, "evaluate": False, "verify": False, **changes}
    return secateur.recover(pruned, pruned.parent / out, data=str(pruned.parent / "text.txt"), **values)


def test_second_run_asks_the_cache_and_not_the_teacher(pruned, monkeypatch):
    first = run(pruned, "first")
    loaded = []
    original = teach.load_model
    monkeypatch.setattr(teach, "load_model", lambda folder, **kw: loaded.append(Path(folder)) or original(folder, **kw))
    monkeypatch.setattr(teach, "build_cache", lambda *a, **k: pytest.fail("the teacher was asked again"))
    second = run(pruned, "second")
    assert loaded == []
    assert second.training["losses"] == first.training["losses"]
    names = ("first", "second")
    weights = [(pruned.parent / name / "model.safetensors").read_bytes() for name in names]
    assert weights[0] == weights[1]
    monkeypatch.setattr(teach, "build_cache", lambda *a, **k: (_ for _ in ()).throw(SecateurError("asked")))
    with pytest.raises(SecateurError, match="asked"):
        run(pruned, "third", top_k=5)


def test_run_with_a_damaged_cache_is_refused_and_leaves_nothing(pruned):
    run(pruned, "first")
    (folder,) = (path for path in module.cache_folder().glob("teachers/*") if path.is_dir())
    _truncate(folder / "log.npy")
    with pytest.raises(SecateurError) as caught:
        run(pruned, "second")
    assert str(folder) in caught.value.message
    assert not list(pruned.parent.glob("second*"))


def test_live_teacher_and_cache_teach_the_same(pruned, monkeypatch):
    """Training through the cache goes where training with the teacher in memory goes."""
    cached = run(pruned, "cached", compute_dtype="float32", top_k=VOCABULARY)
    monkeypatch.setattr(teach, "_teacher_cache", lambda *a: None)
    live = run(pruned, "live", compute_dtype="float32", top_k=VOCABULARY)
    for (_, ours), (_, theirs) in zip(cached.training["losses"], live.training["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_another_config_of_the_teacher_is_another_cache(pruned):
    run(pruned, "first")
    config = pruned.parent / "dense" / "config.json"
    config.write_text(config.read_text().replace("1e-06", "0.5"))
    run(pruned, "second")
    assert len([path for path in module.cache_folder().glob("teachers/*") if path.is_dir()]) == 2
