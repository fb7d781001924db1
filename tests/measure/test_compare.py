"""The worker process and the comparison of two folders."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from typing import ClassVar

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.errors import RunError
from secateur.measure import compare
from secateur.measure import worker as worker_module
from secateur.measure.compare import Worker, interval_of_ratios, measure_pair
from tests.models import save_tiny, tiny_model, tiny_tokenizer

FRESH_INTERPRETERS = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def worker(folder):
    with Worker(folder, threads=1) as worker:
        yield worker


def test_load_and_memory(worker):
    found = worker.ask("load")
    assert found["class"] == "LlamaForCausalLM"
    assert found["dtype"] == "float32"
    assert found["parameters"] == tiny_model("llama").num_parameters()
    memory = worker.ask("resident")
    assert memory["bytes_resident_before"] == found["bytes_resident_before"]
    assert 10e6 < memory["bytes_resident"] < 10e9


def test_logits_equal_those_in_this_process(worker, tmp_path):
    tokens = torch.randint(3, 100, (2, 17))
    save_file({"input_ids": tokens}, tmp_path / "in.safetensors")
    answer = worker.ask("logits", inputs=str(tmp_path / "in.safetensors"), out=str(tmp_path / "out.safetensors"))
    assert answer["outputs"]["logits"] == [2, 17, 128]
    with torch.no_grad():
        expected = tiny_model("llama")(tokens).logits
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, rtol=1e-4, atol=1e-5)


def test_decoding_is_greedy_and_runs_to_the_full_length(worker):
    answer = worker.ask("decode", prompt_tokens=[5, 6, 7], new_tokens=9)
    model, tokens = tiny_model("llama"), [5, 6, 7]
    for _ in range(10):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert answer["new_tokens"] == tokens[3:]
    assert answer["tokens"] == 9
    assert answer["seconds"] > 0


def test_continuation_is_the_new_text_only(worker, folder):
    text = worker.ask("continue", prompt="abc", new_tokens=7)["text"]
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        found = tiny_model("llama").generate(
            **tokenizer("abc", return_tensors="pt"), max_new_tokens=7, do_sample=False, pad_token_id=0
        )
    assert text == tokenizer.decode(found[0, 3:], skip_special_tokens=True)


def test_a_refusal_leaves_the_worker_alive(worker):
    with pytest.raises(RunError, match="unknown op"):
        worker.ask("nonsense")
    with pytest.raises(RunError, match="logits"):
        worker.ask("logits", inputs="/nowhere", out="/nowhere")
    assert worker.ask("resident")["bytes_resident"] > 0


def test_libraries_cannot_disturb_the_answers(folder, tmp_path):
    """Whatever is written to stdout inside the worker, by Python or below it, stays out of the protocol."""
    noise = tmp_path / "sitecustomize.py"
    noise.write_text(
        "import transformers\n"
        "old = transformers.LlamaForCausalLM.forward\n"
        "def forward(self, *args, **kwargs):\n"
        "    import os\n"
        "    print('chatter'); os.write(1, b'more chatter')\n"
        "    return old(self, *args, **kwargs)\n"
        "import functools\n"
        "transformers.LlamaForCausalLM.forward = functools.wraps(old)(forward)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = compare.Path(compare.__file__).with_name("worker.py")
    requests = '{"op": "decode", "prompt_tokens": [5], "new_tokens": 2}\n{"op": "quit"}\n'
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), "--threads", "1"],
        input=requests,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "chatter" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith('{"ok": true')


def test_the_worker_needs_no_secateur_for_a_stock_folder(tmp_path, monkeypatch):
    """What it reports is what anybody gets: another secateur, which would leave a mark, is never imported."""
    (tmp_path / "path" / "secateur").mkdir(parents=True)
    mark = tmp_path / "imported"
    (tmp_path / "path" / "secateur" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with Worker(save_tiny(tmp_path / "llama", "llama"), "float32", threads=1) as worker:
        assert worker.ask("load")["class"] == "LlamaForCausalLM"
    assert not mark.exists()


def test_other_models_open_by_their_own_class(tmp_path):
    folder = save_tiny(tmp_path / "bert", "bert")
    save_file({"input_ids": torch.tensor([[5, 6, 7]])}, tmp_path / "in.safetensors")
    with Worker(folder, "bfloat16", threads=1) as worker:
        assert worker.ask("load")["class"] == "BertForMaskedLM"
        worker.ask("logits", inputs=str(tmp_path / "in.safetensors"), out=str(tmp_path / "out.safetensors"))
        assert load_file(tmp_path / "out.safetensors")["logits"].dtype == torch.bfloat16
        with pytest.raises(RunError, match="does not decode"):
            worker.ask("decode", prompt_tokens=[5], new_tokens=2)


def test_a_folder_that_cannot_be_opened(tmp_path):
    with Worker(tmp_path, threads=1) as worker, pytest.raises(RunError, match=r"config\.json"):
        worker.ask("load")


def test_a_dead_process_is_told_and_no_process_is_left(folder):
    with Worker(folder, threads=1) as worker:
        process = worker._process
        assert process is not None
        process.kill()
        with pytest.raises(RunError, match="signal 9"):
            worker.ask("load")
    with Worker(folder, threads=1) as other:
        left = other._process
        assert left is not None
    assert not psutil.pid_exists(process.pid)
    assert not psutil.pid_exists(left.pid)


def test_a_pair_of_the_same_folder(folder):
    pair = measure_pair(
        folder, folder, prompt_tokens=[5, 6], prompt="abc", new_tokens=3, rounds=3, continuation_tokens=4, threads=1
    )
    assert pair.before.continuation == pair.after.continuation
    assert len(pair.before.rounds) == len(pair.after.rounds) == 3
    assert pair.decode_ratio is not None
    assert pair.decode_ratio.low <= pair.decode_ratio.median <= pair.decode_ratio.high
    assert pair.before.bytes_resident > 0


class FakeWorker:
    """Answers at once, and notes who was asked what; the second folder decodes twice as fast."""

    asked: ClassVar[list[tuple[str, str]]] = []
    open_now: ClassVar[list[int]] = [0, 0]  # now, and the most at a time

    def __init__(self, folder, dtype="auto", *, device="cpu", threads=None):
        self.name = folder.name

    def __enter__(self):
        self.open_now[0] += 1
        self.open_now[1] = max(self.open_now)
        return self

    def __exit__(self, *error):
        self.open_now[0] -= 1

    def ask(self, op, **arguments):
        self.asked.append((self.name, op))
        seconds = 2.0 if self.name == "a" else 1.0
        return {
            "load": {},
            "resident": {"bytes_resident_before": 5, "bytes_resident": 12},
            "decode": {"tokens": arguments.get("new_tokens"), "seconds": seconds},
            "continue": {"text": "and so on"},
        }[op]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(compare, "Worker", FakeWorker)
    FakeWorker.asked.clear()
    FakeWorker.open_now[:] = [0, 0]
    return FakeWorker


@pytest.mark.parametrize("together", [True, False])
def test_the_two_take_turns(fake, monkeypatch, together):
    monkeypatch.setattr(compare, "fit_together", lambda folders: together)
    pair = measure_pair("x/a", "x/b", prompt_tokens=[5], new_tokens=4, rounds=3)
    decoded = [name for name, op in fake.asked if op == "decode"]
    warm_up = ["a", "b"]
    each = ["a", "b"] if together else ["a", "a", "b", "b"]  # loaded anew, the first decode warms up
    assert decoded == warm_up + each * 3
    assert fake.open_now == [0, 2 if together else 1]
    assert pair.before.rounds == [2.0] * 3
    assert pair.after.rounds == [4.0] * 3
    assert pair.decode_ratio is not None
    assert pair.decode_ratio.median == 2
    assert pair.before.bytes_resident == 7
    assert pair.protocol["both_in_memory"] is together


@pytest.mark.parametrize("together", [True, False])
def test_a_meter_is_read_around_every_decode_that_counts(fake, monkeypatch, together):
    class Meter:
        reads = 0

        def start(self):
            fake.asked.append(("meter", "start"))

        def joules(self):
            fake.asked.append(("meter", "read"))
            self.reads += 1
            return 10.0 * self.reads

    monkeypatch.setattr(compare, "fit_together", lambda folders: together)
    pair = measure_pair("x/a", "x/b", prompt_tokens=[5], new_tokens=4, rounds=2, meter=Meter())
    assert pair.before.joules_per_token == [2.0, 6.0]  # by one token of the prompt and four new ones
    assert pair.after.joules_per_token == [4.0, 8.0]
    starts = [place for place, one in enumerate(fake.asked) if one == ("meter", "start")]
    assert all(fake.asked[place + 1][1] == "decode" and fake.asked[place + 2] == ("meter", "read") for place in starts)
    assert measure_pair("x/a", "x/b", prompt_tokens=[5], new_tokens=4, rounds=2).after.joules_per_token == []


def test_on_an_accelerator_the_memory_is_that_of_the_device(folder, monkeypatch):
    server = worker_module.Server(folder, "auto", "cpu")
    server.load()
    server.device = "cuda"
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 1234 if device.type == "cuda" else 0)
    assert server.resident()["bytes_resident"] == 1234
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 567)
    server.device = "mps"
    assert server.resident()["bytes_resident"] == 567


def test_without_a_prompt_memory_alone_is_measured(fake):
    pair = measure_pair("x/a", "x/b")
    assert pair.decode_ratio is None
    assert pair.before.decode_tokens_per_second is None
    assert pair.after.bytes_resident == 7
    assert {op for _, op in fake.asked} == {"load", "resident"}


def test_workers_are_closed_when_something_fails(fake, monkeypatch):
    def fail(self, op, **arguments):
        if self.name == "b":
            raise RunError("no")
        return {"bytes_resident_before": 5, "bytes_resident": 12}

    monkeypatch.setattr(fake, "ask", fail)
    with pytest.raises(RunError, match="no"):
        measure_pair("x/a", "x/b")
    assert fake.open_now[0] == 0


SPEEDS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=25)


@given(SPEEDS)
def test_interval_holds_the_median_and_covers_what_it_says(pairs):
    before, after = zip(*pairs, strict=True)
    found = interval_of_ratios(before, after)
    ratios = sorted(b / a for a, b in pairs)
    assert found.median == statistics.median(ratios)
    assert found.low <= found.median <= found.high
    # A cut of k at both ends covers 1 - 2 P(at most k of n fair coins are heads).
    cuts = [
        1 - 2 * sum(math.comb(len(ratios), i) for i in range(k + 1)) / 2 ** len(ratios)
        for k in range((len(ratios) + 1) // 2)
        if (ratios[k], ratios[-1 - k]) == (found.low, found.high)
    ]
    assert found.coverage in [pytest.approx(max(0.0, coverage)) for coverage in cuts]
    assert found.coverage >= 0.95 or (found.low, found.high) == (ratios[0], ratios[-1])


@pytest.mark.parametrize(("count", "low", "high"), [(5, 0, 4), (6, 0, 5), (9, 1, 7), (20, 5, 14)])
def test_intervals_of_the_sign_test(count, low, high):
    """The ranks of the tables of the sign test (95 %, two-sided)."""
    ratios = [1 + rank / 100 for rank in range(count)]
    found = interval_of_ratios([1.0] * count, ratios)
    assert (found.low, found.high) == (ratios[low], ratios[high])


def test_differs_needs_more_than_the_placement_of_memory():
    assert not interval_of_ratios([1.0] * 6, [1.01] * 6).differs
    assert interval_of_ratios([1.0] * 6, [1.2] * 6).differs
    assert interval_of_ratios([1.0] * 6, [0.8] * 6).differs
    assert not interval_of_ratios([1.0] * 6, [0.9, 1.3, 1.3, 1.3, 1.3, 1.3]).differs
