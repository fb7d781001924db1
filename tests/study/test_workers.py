"""Trials in processes of their own: what goes in and comes out, and a worker that is killed on purpose."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from secateur.errors import MissingExtraError, StudyError
from secateur.progress import Recorder
from secateur.study import run_study, study_status
from secateur.study.trial import Outcome, Task
from secateur.study.workers import Cluster, Died, Processes, how_it_ended
from tests.study.studies import StandIn, write_study


def hopeless_task(number: int, folder: Path) -> Task:
    """One that fails as soon as it begins: its model is not there."""
    return Task(
        number=number, model=str(folder / "nothing"), dense="", recipe={"method": "magnitude"}, training=None,
        out=str(folder / f"out-{number}"), choice="",
    )  # fmt: skip


def test_tasks_and_outcomes_travel_as_json():
    task = Task(
        number=3, model="m", dense="d", recipe={"sparsity": 0.1 + 0.2}, training=None, out="o", choice="w",
        bar={"windows": 2, "factor": 3.0, "limits": [["a", 1.0]]},
    )  # fmt: skip
    assert Task.from_json(task.to_json()) == task
    outcome = Outcome("stopped", {"perplexity": None, "sparsity": 0.1}, {"w": 0.5}, "why", 1.5, ["careful"])
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_worker_answers_and_one_that_is_killed_is_told_and_replaced(tmp_path):
    pool = Processes(1)
    try:
        pool.submit(hopeless_task(0, tmp_path))
        ((number, outcome),) = pool.wait()
        assert (number, outcome.state) == (0, "failed")
        assert "nothing" in outcome.reason
        ((process, _),) = pool._idle
        os.kill(process.pid, signal.SIGSTOP)  # it takes the next task, and cannot begin it
        pool.submit(hopeless_task(1, tmp_path))
        os.kill(process.pid, signal.SIGKILL)
        ((number, died),) = pool.wait()
        assert (number, type(died)) == (1, Died)
        assert "SIGKILL" in died.how
        pool.submit(hopeless_task(1, tmp_path))
        ((number, outcome),) = pool.wait()
        assert (number, outcome.state) == (1, "failed")
        last = pool._idle[0][0]
    finally:
        pool.close()
    assert not last.is_alive()


@pytest.mark.parametrize(("code", "words"), [(-9, "SIGKILL"), (3, "status 3"), (-11, "SIGSEGV")])
def test_the_end_of_a_process_in_words(code, words):
    assert words in how_it_ended(code)


class Mortal:
    """A pool of two in which chosen trials die so many times first."""

    capacity, threads = 2, 1

    def __init__(self, deaths: dict[int, int]) -> None:
        self.deaths, self.trials, self.waiting = deaths, StandIn(), []

    def submit(self, task):
        assert len(self.waiting) < self.capacity
        self.waiting.append(task)

    def wait(self):
        task = self.waiting.pop()
        if self.deaths.get(task.number, 0):
            self.deaths[task.number] -= 1
            return [(task.number, Died("killed by SIGKILL"))]
        return [(task.number, self.trials(task))]

    def close(self):
        self.waiting.clear()


@pytest.fixture
def mortal(monkeypatch):
    def install(deaths):
        pool = Mortal(deaths)
        monkeypatch.setattr("secateur.study.run.Processes", lambda count: pool)
        return pool

    return install


def test_a_dead_workers_trial_is_tried_again_and_counted_once(place, mortal):
    pool = mortal({1: 2})
    result = run_study(write_study(place, budget={"trials": 3}), workers=2)
    assert [(trial.number, trial.state, trial.tries) for trial in result.trials] == [
        (0, "complete", 1), (1, "complete", 3), (2, "complete", 1),
    ]  # fmt: skip
    assert sorted(task.number for task in pool.trials.tasks) == [0, 1, 2]


def test_a_trial_that_kills_three_workers_is_given_up(place, mortal):
    mortal({1: 5})
    recorder = Recorder()
    result = run_study(write_study(place), workers=2, reporter=recorder)
    assert [trial.state for trial in result.trials] == ["complete", "failed", "complete"]
    assert "begun 3 times, and each time killed by SIGKILL" in result.trials[1].reason
    assert sum("trial 1: killed" in warning for warning in recorder.warnings) == 3


def test_no_worker_waits_for_a_model_that_another_prunes(place, mortal):
    """With and without recovery from one pruned model: never begun side by side while something else is left."""
    pool = mortal({})
    space = {"sparsity": [0.3, 0.5, 0.7], "recovery": ["none", {"mode": "full", "loss": "lm", "tokens": 256}]}
    side_by_side: list[tuple[float, float]] = []
    submit = pool.submit

    def watched(task):
        side_by_side.extend((one.recipe["sparsity"], task.recipe["sparsity"]) for one in pool.waiting)
        submit(task)

    pool.submit = watched
    result = run_study(write_study(place, space=space), workers=2)
    assert [trial.state for trial in result.trials] == ["complete"] * 6
    found = sorted((trial.settings["sparsity"], trial.settings["recovery"] == "none") for trial in result.trials)
    assert found == [(sparsity, alone) for sparsity in (0.3, 0.5, 0.7) for alone in (False, True)]
    assert len(side_by_side) == 5
    assert sum(a == b for a, b in side_by_side) <= 1  # at most the last two, when nothing else is left


def test_a_budget_of_trials_is_the_first_of_the_grid_with_any_number_of_workers(place, mortal):
    mortal({})
    space = {"sparsity": [0.3, 0.5, 0.7], "recovery": ["none", {"mode": "full", "loss": "lm", "tokens": 256}]}
    result = run_study(write_study(place, space=space, budget={"trials": 3}), workers=2)
    found = sorted((trial.settings["sparsity"], trial.settings["recovery"] == "none") for trial in result.trials)
    assert found == [(0.3, False), (0.3, True), (0.5, True)]


def test_workers_and_ray_contradict_each_other(place):
    for arguments in ({"workers": 0}, {"workers": 2, "ray": "local"}):
        with pytest.raises(StudyError):
            run_study(write_study(place), **arguments)


class FakeRay:
    """A cluster of two machines that runs nothing."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses, self.running, self.asked = refuses, False, []

    def is_initialized(self):
        return self.running

    def init(self, address, **_):
        self.asked.append(address)
        if self.refuses:
            raise ConnectionError(self.refuses)
        self.running = True

    def nodes(self):
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}}
        return [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 4e9}} for _ in range(2)] + [gone]

    def cluster_resources(self):
        return {"CPU": 4.0, "memory": 8e9}

    def remote(self, **_):
        return lambda function: function

    def shutdown(self):
        self.running = False


def test_as_many_trials_at_once_as_the_cluster_holds(monkeypatch):
    for asked, count in (((1, 0, None), 4), ((2, 0, None), 2), ((1, 0, 3 * 10**9), 2)):
        monkeypatch.setattr("secateur.study.workers.import_ray", lambda: FakeRay())
        cpus, gpus, memory = asked
        assert Cluster("auto", cpus=cpus, gpus=gpus, memory=memory).capacity == count


@pytest.mark.parametrize(
    ("resources", "told"),
    [({"cpus": 3}, "3 CPU"), ({"gpus": 1}, "1 CPU, 1 GPU"), ({"memory": "5GB"}, "1 CPU, 5 GB")],
)
def test_a_trial_that_no_machine_can_run_is_refused_before_any_work(resources, told, place, trials, monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr("secateur.study.workers.import_ray", lambda: fake)
    with pytest.raises(StudyError, match="no machine") as raised:
        run_study(write_study(place, resources=resources), ray="auto")
    assert f"asks for {told} (" in raised.value.message
    assert "there are: 2 CPU, 4 GB; 2 CPU, 4 GB)" in raised.value.message
    assert not fake.running
    assert study_status(place / "tiny.db").baselines == trials.tasks == []


def test_a_cluster_that_is_not_there_is_told_before_any_work(place, trials, monkeypatch):
    fake = FakeRay("no running Ray instance\nand a long story")
    monkeypatch.setattr("secateur.study.workers.import_ray", lambda: fake)
    for address in ("auto", "127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(StudyError, match=f"no Ray cluster at {address}: ") as raised:
            run_study(write_study(place), ray=address)
        assert raised.value.hint
        assert "\n" not in raised.value.message
    assert fake.asked == ["auto"]  # nobody listens at the others, which Ray would find out minutes later
    assert study_status(place / "tiny.db").baselines == trials.tasks == []


def test_without_ray_nothing_is_begun(place, trials, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="needs Ray"):
        run_study(write_study(place), ray="auto")
    assert not (place / "tiny.db").exists()


@pytest.fixture
def ray_cluster(monkeypatch):
    """A cluster of several processes on this machine."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "200000")  # a machine under load is slow to start it
    try:
        ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # noqa: BLE001 - where it may open no ports, Ray fails in ways of its own
        pytest.skip(f"Ray does not start here: {type(error).__name__}")
    yield ray
    ray.shutdown()


def test_a_study_on_a_ray_cluster_survives_a_worker_that_is_killed(ray_cluster, place, monkeypatch):
    def die(text: str) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return text

    real, killed = Cluster.submit, []

    def submit(self, task):
        if killed:
            real(self, task)
            return
        killed.append(task.number)
        self._busy[ray_cluster.remote(num_cpus=1, max_retries=0)(die).remote(task.to_json())] = task.number

    monkeypatch.setattr(Cluster, "submit", submit)
    recorder = Recorder()
    space = {"method": "magnitude", "sparsity": 0.5}
    result = run_study(write_study(place, space=space), ray="local", reporter=recorder)
    (trial,) = result.trials
    assert (trial.state, trial.tries, trial.values["sparsity"]) == ("complete", 2, 0.5), trial.reason
    assert any("trial 0: its Ray worker is gone" in warning for warning in recorder.warnings)
    assert result.machine["trials_at_once"] == 2
    assert len(result.finalists) == 1
