"""Models measured in turn: order, failures, memory, energy."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from secateur.errors import RunError
from secateur.measure.in_turn import Contender, Load, measure_in_turn
from secateur.progress import Recorder

LOAD = Load(tokens=range(16), new_tokens=4)


class Fake:
    """Answers like a worker; what it was asked goes into a list that all share."""

    def __init__(self, name, log, *, seconds=1.0, fails_at=None):
        self.name, self.log, self.seconds, self.fails_at = name, log, seconds, fails_at
        self.asked = 0

    def __enter__(self):
        self.log.append(f"open {self.name}")
        return self

    def __exit__(self, *exc):
        self.log.append(f"close {self.name}")

    def ask(self, op, **arguments):
        self.asked += 1
        if self.fails_at is not None and self.asked >= self.fails_at:
            raise RunError(f"{self.name} died")
        self.log.append(f"{op} {self.name}")
        if op == "resident":
            return {"bytes_resident_before": 10, "bytes_resident": 10 + len(self.name)}
        if op == "speed":
            return {"prefill_tokens_per_second": 32.0, "decode_tokens_per_second": 5.0}
        if op == "encode":
            return {"tokens": len(arguments["tokens"]), "seconds": self.seconds}
        rows = arguments.get("rows", 1)
        return {"tokens": rows * arguments["new_tokens"], "seconds": self.seconds, "prefill_seconds": 0.5}


def contender(name, log, *, runtime="transformers", size=1, decodes=True, **how):
    return Contender(name, lambda: Fake(name, log, **how), runtime, size, decodes)


def test_every_round_runs_all_of_them_one_after_the_other():
    log: list[str] = []
    measure_in_turn([contender(name, log) for name in "abc"], LOAD, rounds=2)
    rounds = [line for line in log[log.index("resident c") + 1 :] if line.startswith("decode")]
    one = [f"decode {name}" for name in "abc" for _ in range(2)]  # a row, then eight
    assert rounds == [*one, *one]
    assert [line for line in log if line.startswith("close")] == ["close c", "close b", "close a"]


def test_values_are_those_of_the_rounds():
    log: list[str] = []
    a, b = measure_in_turn([contender("a", log), contender("bb", log, seconds=2.0)], LOAD, rounds=3)
    assert a.bytes_resident == 1
    assert b.bytes_resident == 2
    assert a.rounds["decode_tokens_per_second"] == [4.0] * 3
    assert b.median("decode_tokens_per_second") == 2.0
    assert a.median("prefill_tokens_per_second") == 32.0
    assert a.median("seconds_to_first_token") == 0.5
    assert a.median("decode_tokens_per_second_batch_8") == 8 * 2  # half of the new tokens, in eight rows
    assert a.median("joules_per_token") is None


def test_where_memory_is_too_small_each_is_loaded_for_its_turn(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    log: list[str] = []
    found = measure_in_turn([contender(name, log, size=1e9) for name in "ab"], LOAD, rounds=2)
    opened = [line for line in log if line.startswith(("open", "close"))]
    assert opened == ["open a", "close a", "open b", "close b"] * 3
    assert [len(one.rounds["decode_tokens_per_second"]) for one in found] == [2, 2]


@pytest.mark.parametrize("fails_at", [1, 4, 6])
def test_one_that_fails_is_told_and_the_others_go_on(fails_at):
    log: list[str] = []
    recorder = Recorder()
    good, bad = measure_in_turn(
        [contender("good", log), contender("bad", log, fails_at=fails_at)], LOAD, rounds=3, reporter=recorder
    )
    assert len(good.rounds["decode_tokens_per_second"]) == 3
    assert bad.rounds == {}
    assert bad.missing["speed"] == "bad died"
    assert recorder.warnings == ["speed of bad was not measured: bad died"]


def test_a_meter_is_read_around_the_work_of_a_single_row():
    class Meter:
        sees_processor = True

        def start(self):
            log.append("start")

        def joules(self):
            log.append("read")
            return 40.0

    log: list[str] = []
    (found,) = measure_in_turn([contender("a", log)], LOAD, rounds=1, meter=Meter())
    assert log[-5:-1] == ["start", "decode a", "read", "decode a"]
    assert found.median("joules_per_token") == 40.0 / (16 + 4)


def test_a_meter_of_cards_says_nothing_of_what_runs_on_the_processor():
    meter = SimpleNamespace(sees_processor=False, start=lambda: None, joules=lambda: 40.0)
    both = [contender("card", []), contender("processor", [], runtime="llama.cpp")]
    card, processor = measure_in_turn(both, LOAD, rounds=1, meter=meter)
    assert card.median("joules_per_token") == 2.0
    assert processor.median("joules_per_token") is None
    assert "runs on the processor" in processor.missing["joules_per_token"]


def test_what_a_runtime_cannot_do_has_its_reason():
    log: list[str] = []
    llama, encoder = measure_in_turn(
        [contender("l", log, runtime="llama.cpp"), contender("e", log, decodes=False)], LOAD, rounds=1
    )
    assert llama.median("decode_tokens_per_second") == 5.0
    assert llama.median("seconds_to_first_token") == 0.5
    assert "llama.cpp" in llama.missing["decode_tokens_per_second_batch_8"]
    assert encoder.median("prefill_tokens_per_second") == 16.0
    assert set(encoder.missing) == {
        "decode_tokens_per_second", "decode_tokens_per_second_batch_8", "seconds_to_first_token",
    }  # fmt: skip
