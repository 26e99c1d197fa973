"""The launcher debug: the stages of a run in one process, which is as it was afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from running import NANO, only, run_here

from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.launchers import debug
from pipeline.workflow.artifact import is_done, open_artifact
from pipeline.workflow.lock import lock
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import read_progress

ONE = [*NANO, "cluster.processes=1"]


def test_it_leaves_what_processes_leave_and_its_own_process_as_it_was(nano: Path, tmp_path: Path) -> None:
    before, linear = dict(os.environ), torch.nn.functional.linear
    run_here("run", "tiny", *ONE, "cluster.grpo.deepspeed=zero3", "--runs", str(tmp_path))
    assert dict(os.environ) == before
    assert torch.nn.functional.linear is linear  # which ZeRO-3 replaces
    assert not dist.is_initialized()
    ours, theirs = ({path.name: path for path in runs.glob("tiny/*")} for runs in (tmp_path, nano))
    assert set(ours) == set(theirs)  # the same steps: where they run decides nothing
    assert {open_artifact(folder, deep=True).provenance["processes"] for folder in ours.values()} == {1}
    (base,) = (name for name in ours if name.startswith("evaluate-base-"))
    one, other = ((runs[base] / "predictions.jsonl").read_text() for runs in (ours, theirs))
    assert one == other
    assert open_artifact(only(tmp_path, "tiny/sft-*")).metrics["steps"] == 6


def test_an_error_reaches_the_debugger_and_the_step_says_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of the user's as the error that it is, anything else as it was raised."""
    words = ["task.source=path", f"task.path={tmp_path}/nowhere.jsonl", "--stages", "preprocess"]
    with pytest.raises(PipelineError, match=r"nowhere\.jsonl"):
        run_here("run", "gsm8k", *words, "--runs", str(tmp_path))

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pipeline.preprocess.run", fail)
    plan = make_plan(["tiny"], ["cluster.launcher=debug"], stages=["preprocess"], runs=tmp_path)
    (step,) = plan.to_run
    with pytest.raises(ZeroDivisionError, match="a bug"):
        debug.run_step(step, plan, "[1/1] preprocess")
    assert not is_done(step.folder)
    progress = read_progress(step.folder)
    assert progress is not None
    assert (progress.state, progress.problems) == ("failed", ("ZeroDivisionError: a bug",))
    with lock(step.folder), pytest.raises(ArtifactError, match="is being written by process"):
        debug.run_step(step, plan, "[1/1] preprocess")


def test_it_is_one_process(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"cluster\.processes: got 2; expected 1, because the launcher debug"):
        make_plan(["tiny"], ["cluster.launcher=debug", "cluster.processes=2"], runs=tmp_path)
    plan = make_plan(["tiny"], ["cluster.launcher=debug", "cluster.sft.deepspeed=zero2"], runs=tmp_path)
    assert plan.cluster.processes == "auto"
