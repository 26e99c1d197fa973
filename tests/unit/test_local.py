"""local: a step runs beside another where cores, GPUs and memory are free, and never before its inputs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import LaunchError, PipelineError, Stopped
from pipeline.launchers import local, room
from pipeline.launchers.local import _Run
from pipeline.launchers.room import Room, share_of
from pipeline.launchers.stops import StopRequests
from pipeline.workflow.artifact import Artifact, finalize
from pipeline.workflow.plan import Plan, Step, make_plan

SIDE = ["cluster.processes=1", "cluster.threads=1"]


def planned(tmp_path: Path, *words: str) -> Plan:
    return make_plan(["tiny"], words, runs=tmp_path / "runs")


def finish(step: Step) -> None:
    """Leave an artifact, as the step's process does."""
    step.folder.mkdir(parents=True, exist_ok=True)
    finalize(Artifact(step.name, step.stage, "tiny", step.fingerprint, step.payload, {}, {}, {}, {}, step.folder))


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(room, "core_count", lambda: count)


def run(plan: Plan, work: Callable[[Step], None], stops: StopRequests | None = None) -> list[str]:
    """Run a plan's steps as `work`. Returns the names of those that ran."""
    todo = plan.to_run
    with ThreadPoolExecutor(len(todo)) as pool:

        def start(step: Step, title: str, more: Mapping[str, str]) -> Future[None]:
            def worked() -> None:
                work(step)
                finish(step)

            return pool.submit(worked)

        return [step.name for step in _Run(plan, todo, start, stops).run()]


class Meeting:
    """Work during which some steps must run at the same time: each waits until the others have begun."""

    def __init__(self, *names: str) -> None:
        self.names, self.barrier = names, threading.Barrier(len(names))
        self.begun: list[str] = []
        self.now, self.most = 0, 0
        self.lock = threading.Lock()

    def __call__(self, step: Step) -> None:
        with self.lock:
            self.begun.append(step.name)
            self.now += 1
            self.most = max(self.most, self.now)
        if step.name in self.names:
            self.barrier.wait(5)
        with self.lock:
            self.now -= 1


def test_the_base_model_is_evaluated_beside_sft_where_cores_are_free(
    tmp_path: Path, cores: Callable[[int], None]
) -> None:
    cores(2)
    work = Meeting("sft", "evaluate-base")
    ran = run(planned(tmp_path, *SIDE), work)
    assert sorted(ran) == sorted(step.name for step in planned(tmp_path).steps)
    assert work.most == 2
    begun = work.begun
    assert begun[0] == "preprocess"
    assert begun[-1] == "report"
    assert begun.index("sft") < begun.index("grpo") < begun.index("evaluate-grpo")


@pytest.mark.parametrize("words", [[], ["cluster.processes=2"], ["cluster.processes=1", "cluster.threads=2"]])
def test_steps_that_need_all_cores_run_one_after_another(
    tmp_path: Path, cores: Callable[[int], None], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    cores(2)
    work = Meeting()
    ran = run(planned(tmp_path, *words), work)
    assert work.most == 1
    assert ran == [step.name for step in planned(tmp_path).steps]


def test_a_step_beside_one_that_fails_goes_on_to_its_end(tmp_path: Path, cores: Callable[[int], None]) -> None:
    cores(2)
    both, failed = threading.Barrier(2), threading.Event()
    ended: list[str] = []

    def work(step: Step) -> None:
        if step.name in ("sft", "evaluate-base"):
            both.wait(5)
        if step.name == "sft":
            failed.set()
            raise LaunchError("tiny/sft: the loss is not finite")
        if step.name == "evaluate-base":
            failed.wait(5)
        ended.append(step.name)

    with pytest.raises(LaunchError) as found:
        run(planned(tmp_path, *SIDE), work)
    assert ended == ["preprocess", "evaluate-base"]
    assert found.value.problems[0] == "tiny/sft: the loss is not finite"
    assert all("skipped, because its input" in problem for problem in found.value.problems[1:])
    assert len(found.value.problems) == 5  # grpo, both evaluations of what is not trained, the report


def test_after_a_stop_no_step_begins(
    tmp_path: Path, cores: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cores(2)
    both = threading.Barrier(2)
    begun: list[str] = []

    def work(step: Step) -> None:
        begun.append(step.name)
        if step.name in ("sft", "evaluate-base"):
            both.wait(5)
            error: type[PipelineError] = Stopped if step.name == "sft" else LaunchError
            raise error(f"{step.name} ended")

    with pytest.raises(Stopped, match="sft ended"):
        run(planned(tmp_path, *SIDE), work)
    assert sorted(begun) == ["evaluate-base", "preprocess", "sft"]
    assert "error: evaluate-base ended" in capsys.readouterr().err


def test_an_error_of_the_launcher_ends_the_other_steps(tmp_path: Path, cores: Callable[[int], None]) -> None:
    cores(2)
    both, stops = threading.Barrier(2), StopRequests()

    def work(step: Step) -> None:
        if step.name in ("sft", "evaluate-base"):
            both.wait(5)
        if step.name == "sft":
            raise ValueError("a bug")
        if step.name == "evaluate-base":
            assert stops.wait(5)
            raise Stopped("ended")

    with pytest.raises(ValueError, match="a bug"):
        run(planned(tmp_path, *SIDE), work, stops)
    assert stops.count > 1


WAITS = "touch $0/begun; until [ -e $0/stop ]; do sleep 0.05; done; touch $0/ended; exit 75"


def test_one_request_stops_both_steps(
    tmp_path: Path, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cores(2)
    plan = planned(tmp_path, *SIDE)
    finish(step_of(plan, "preprocess"))
    both = [step_of(plan, name).folder for name in ("sft", "evaluate-base")]
    monkeypatch.setattr(local, "command", lambda stage, folder, cluster: ["sh", "-c", WAITS, str(folder)])

    def request() -> None:
        while not all((folder / "begun").exists() for folder in both):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=request)
    helper.start()
    with pytest.raises(Stopped, match="Fix: run the same command to resume"):
        local.run_plan(plan)
    helper.join()
    assert all((folder / "ended").exists() for folder in both)  # by themselves: they were not killed
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "runs" / "tiny").iterdir()} == {
        *("preprocess", "sft", "evaluate-base")
    }
    shown = capfd.readouterr().err
    for step in ("tiny/sft", "tiny/evaluate-base"):
        assert f"stopping: {step} saves at its next optimizer step and exits" in shown
        assert f"{step} …\n" in shown


# ---------------------------------------------------------------- what a step takes


def step_of(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


def test_a_server_is_asked_beside_anything(tmp_path: Path, cores: Callable[[int], None]) -> None:
    cores(1)
    plan = planned(tmp_path, "evaluate.endpoints.there={url: 'https://127.0.0.1/v1', model: m}")
    taken = Room(plan.cluster)
    assert taken.take(step_of(plan, "sft")) == {}
    assert taken.take(step_of(plan, "evaluate-base")) is None
    assert taken.take(step_of(plan, "evaluate-endpoint-there")) == {}
    taken.leave(step_of(plan, "sft"))
    assert taken.take(step_of(plan, "evaluate-base")) == {}


def test_steps_share_out_gpus(tmp_path: Path, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cores(16)
    monkeypatch.setattr(room, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = planned(tmp_path, "cluster.processes=2")
    sft, base, other = (step_of(plan, name) for name in ("sft", "evaluate-base", "evaluate-sft"))
    monkeypatch.setattr(room, "limit", lambda cluster: 1e15)
    taken = Room(plan.cluster)
    assert taken.take(sft) == {}  # its processes use the first two
    assert taken.take(base) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert taken.take(other) is None
    taken.leave(sft)
    assert taken.take(other) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    taken = Room(plan.cluster)
    taken.take(sft)
    assert taken.take(base) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    spread = replace(plan.cluster, max_memory=planned(tmp_path, "cluster.max_memory={gpu: 10}").cluster.max_memory)
    taken = Room(spread)  # each process may use every GPU
    assert taken.take(base) == {}
    assert taken.take(sft) is None


def test_steps_that_do_not_fit_into_memory_together_run_one_after_another(
    tmp_path: Path, cores: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(4)
    plan = planned(tmp_path, *SIDE)
    sft, base = step_of(plan, "sft"), step_of(plan, "evaluate-base")
    needed = [share_of(step, plan.cluster).memory for step in (sft, base)]
    assert all(2**30 < some < 2**33 for some in needed)
    for most, fits in ((sum(needed), True), (sum(needed) - 1, False)):
        monkeypatch.setattr(room, "limit", lambda cluster, most=most: most)
        taken = Room(plan.cluster)
        taken.take(sft)
        assert (taken.take(base) is not None) == fits
