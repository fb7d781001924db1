"""``secateur recover``: flags become settings, KEY=VALUE is read, cost is told before the start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.cli.recover import default_out, parse_trainer
from secateur.errors import RunError, UsageError
from secateur.result import Measured, RecoverResult
from secateur.training import Training
from tests.models import save_tiny

SOURCE = Path(secateur.__file__).parent.parent


def measured(**values):
    common = {"parameters": 100, "nonzero": 60, "sparsity": 0.5, "bytes_disk": 400_000_000, "dtype": "float32"}
    return Measured(**{**common, **values})


@pytest.fixture
def recovering(verb):
    stand_in = verb("recover")
    stand_in.answer = RecoverResult(
        out="out",
        source={},
        student={},
        settings={},
        sparsity=0.5,
        seconds=1.0,
        peak_rss_bytes=10**9,
        teacher=measured(perplexity=11.25, nonzero=100, sparsity=0.0),
        before=measured(perplexity=44.5),
        after=measured(perplexity=22.75),
        training={"tokens": 65536, "tokens_per_second": 1234.5, "training_loss": 0.25, "held_out_loss": 3.5},
        zeros_held=4321,
        verified=True,
        verdict=["Half of the loss is back."],
    )
    return stand_in


def test_without_flags_the_settings_are_the_defaults(run, recovering):
    assert run("recover", "pruned", "-o", "out").status == 0
    assert recovering.args == ("pruned", Path("out"))
    kwargs = dict(recovering.kwargs)
    assert kwargs.pop("reporter") is not None
    assert kwargs == {
        "settings": Training(),
        "dense": False,
        "resume": False,
        "overwrite": False,
        "verify": True,
        "evaluate": True,
        "measure_data": "builtin",
        "files": (),
    }


GIVEN = {
    "data": "text.txt",
    "mode": "lora",
    "loss": "kd",
    "teacher": "dense",
    "tokens": 5000,
    "learning_rate": 0.002,
    "batch_size": 3,
    "sequence_length": 64,
    "rank": 5,
    "top_k": 7,
    "epochs": 9,
    "experts": 6,
    "dim": 12,
    "held_out": 0.25,
    "gradient_checkpointing": "off",
    "save_minutes": 2.5,
    "trainer": {"lr_scheduler_type": "linear", "warmup_steps": "3"},
    "seed": 11,
    "device": "cpu",
    "compute_dtype": "float32",
}


def test_every_setting_has_its_flag(run, recovering):
    assert {*GIVEN, "minutes"} == {entry.name for entry in dataclasses.fields(Training)}
    words = []
    for name, value in GIVEN.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            words += [word for key, text in value.items() for word in (flag, f"{key}={text}")]
        else:
            words += [flag, str(value)]
    done = run("recover", "pruned", "-o", "out", *words, "--dense", "--resume", "--overwrite", "--no-verify",
               "--no-evaluate", "--measure-data", "m.txt")  # fmt: skip
    assert done.status == 0, done.err
    assert recovering.kwargs["settings"] == Training(**GIVEN)
    for name in ("dense", "resume", "overwrite"):
        assert recovering.kwargs[name] is True
    for name in ("verify", "evaluate"):
        assert recovering.kwargs[name] is False
    assert recovering.kwargs["measure_data"] == "m.txt"
    assert run("recover", "pruned", "-o", "out", "--minutes", "1.5").status == 0
    assert recovering.kwargs["settings"] == Training(minutes=1.5)


def test_result_as_table_and_as_json(run, recovering):
    done = run("recover", "pruned", "-o", "out")
    for text in ("dense", "pruned", "recovered", "11.25", "44.5", "22.75", "65,536", "4,321", "Half of the loss"):
        assert text in done.out, text
    recovering.answer.teacher = None
    assert "11.25" not in run("recover", "pruned", "-o", "out").out
    done = run("recover", "pruned", "-o", "out", "--json")
    assert json.loads(done.out) == recovering.answer.to_dict()


def test_errors_have_their_status(run, recovering):
    def fail(reporter):
        raise RunError("the loss is not finite at step 3", hint="start again")

    recovering.during = fail
    done = run("recover", "pruned", "-o", "out")
    assert done.status == 1
    assert done.out == ""
    assert "error: the loss is not finite at step 3" in done.err
    assert "start again" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "ful"], "did you mean 'full'"),
        (["--loss", "feature"], "did you mean 'features'"),
        (["--tokens", "5", "--minutes", "1"], "both tokens and minutes"),
        (["--tokens", "many"], "--tokens"),
        (["--trainer", "warmup_steps"], "is not KEY=VALUE"),
        (["--trainer", "a=1", "--trainer", "a=2"], "given twice"),
        (["--lerning-rate", "1"], "--learning-rate"),
    ],
)
def test_bad_flags_are_refused_before_the_verb(run, recovering, words, message):
    done = run("recover", "pruned", "-o", "out", *words)
    assert done.status == 2
    assert message in done.err
    assert recovering.calls == 0


def test_default_name_of_the_result(run, recovering, tmp_path, monkeypatch):
    done = run("recover", "some/where/pruned")
    assert recovering.args[1] == Path("pruned-recovered")
    assert "pruned-recovered" in done.err
    assert default_out("owner/name") == Path("name-recovered")
    assert default_out("models/a.gguf") == Path("a-recovered")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_out(".") == Path("here-recovered")
    with pytest.raises(UsageError, match="no folder name"):
        default_out("/")


KEYS = st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True)
VALUES = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), max_size=12)


@given(pairs=st.dictionaries(KEYS, VALUES, max_size=5))
def test_key_value_pairs_are_read(pairs):
    texts = [f" {key.replace('_', '-')} = {value} " for key, value in pairs.items()]
    assert parse_trainer(texts) == pairs


@pytest.mark.parametrize("text", ["", "=", "=1", "key", " = 2"])
def test_texts_that_are_no_pairs(text):
    with pytest.raises(UsageError, match="KEY=VALUE") as caught:
        parse_trainer([text])
    assert "lr_scheduler_type" in caught.value.hint


def test_a_value_may_hold_an_equals_sign():
    assert parse_trainer(["fsdp_config={'a': 'b=c'}"]) == {"fsdp_config": "{'a': 'b=c'}"}


@pytest.mark.parametrize(
    "words", [["--help"], ["m", "--mode", "ful"], ["m", "--trainer", "x"], ["/"]], ids=["help", "mode", "pair", "out"]
)
def test_nothing_heavy_is_imported(words):
    code = f"from secateur.cli.app import main; import sys; s = main(['recover', *{words}])\n"
    code += "print('LOADED', s, *sorted({n.partition('.')[0] for n in sys.modules}))"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "140"},
    )  # fmt: skip
    status, *loaded = done.stdout.splitlines()[-1].split()[1:]
    assert status == ("0" if words == ["--help"] else "2"), done.stderr
    assert not {"torch", "transformers", "numpy", "accelerate", "safetensors", "peft"} & set(loaded)
    assert time.monotonic() - started < 10
    if words == ["--help"]:
        for entry in dataclasses.fields(Training):
            assert "--" + entry.name.replace("_", "-") in done.stdout


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    root = tmp_path_factory.mktemp("recover")
    save_tiny(root / "dense", "llama")
    secateur.prune(root / "dense", root / "pruned", method="magnitude", evaluate=False, verify=False)
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    rows = [{"text": f"a text about thing {i}", "label": i % 2} for i in range(40)]
    (root / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "pruned"


COMMON = ["--sequence-length", "32", "--tokens", "640", "--no-verify", "--no-evaluate"]


def test_a_real_run_tells_its_cost_first(run, pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    data = ["--data", str(pruned.parent / "text.txt")]
    done = run("recover", str(pruned), "-o", str(tmp_path / "out"), *data, *COMMON)
    assert done.status == 0, done.err
    told = " ".join(done.err.split())
    for text in ("20 steps of 32 tokens", "s per 1,000 tokens", "in all", "parameters are trained", " MB"):
        assert text in told, told
    assert f"{secateur.inspect(pruned).parameters:,} parameters" in told
    assert " 0.0 s per 1,000" not in told, "a number that says nothing"
    assert "zeros held" in done.out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("task", ["text", "labels"])
def test_standard_output_is_one_json_object(pruned, tmp_path, task):
    """In a process of its own: libraries write to the same streams."""
    more = ["--mode", "lora"] if task == "text" else ["--loss", "labels"]
    data = pruned.parent / ("text.txt" if task == "text" else "labels.jsonl")
    command = [sys.executable, "-m", "secateur", "recover", str(pruned), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--data", str(data), *COMMON, *more, "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "SECATEUR_CACHE": str(tmp_path / "cache"), "COLUMNS": "140"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    fields = {entry.name for entry in dataclasses.fields(RecoverResult)}
    assert set(found) == fields
    assert found["zeros_held"] > 0
    assert found["settings"]["mode"] == ("lora" if task == "text" else "full")
    for noise in ("Warning", "warn(", "Writing model shards", "LOAD REPORT", "{'loss'", "train_runtime"):
        assert noise not in done.stderr, done.stderr
