"""records: one reader of the small files in a step's folder, whatever they hold."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import run_cli

from pipeline.core import slurm_client as slurm
from pipeline.core.errors import ArtifactError, PlanError
from pipeline.core.files import read_json, write_json
from pipeline.core.records import InvalidRecord, read_record, record_or_none
from pipeline.workflow import status
from pipeline.workflow.artifact import ARTIFACT, PROGRESS, STEP, Artifact, is_done
from pipeline.workflow.jobs import live_jobs
from pipeline.workflow.lock import OWNER, LockHolder, lock, read_holder
from pipeline.workflow.plan import explain, make_plan, spec_of
from pipeline.workflow.progress import Progress, ProgressFile, read_progress
from pipeline.workflow.stage import read_spec, write_spec

KINDS = {PROGRESS: Progress, OWNER: LockHolder, slurm.JOB_FILE: slurm.JobRecord, ARTIFACT: Artifact}
RECORDS: dict[str, dict[str, Any]] = {
    PROGRESS: {"stage": "sft", "state": "running", "done": 3, "total": 9, "started": 1.0, "updated": 7.0, "first": 1},
    OWNER: {"token": "t", "host": "elsewhere", "pid": 1, "started": 1.0, "since": 1.0, "job": None},
    slurm.JOB_FILE: {"token": "t", "launcher": "slurm", "submitted": 1.0, "id": "41", "log": None},
    ARTIFACT: {
        "step": "sft", "stage": "sft", "recipe": "tiny", "fingerprint": "x", "payload": {}, "inputs": {}, "metrics": {},
        "files": {"a": {"size": 1, "sha256": "x"}}, "provenance": {},
    },
}  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**301),
    st.floats(),
    st.text(),
    st.just("\ud800"),
    st.just("\x1b[2J"),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


def step_of(runs: Path, seed: int = 1) -> Path:
    """A step's folder with its order and nothing else."""
    plan = make_plan(["tiny"], [f"seed={seed}"], stages=("preprocess",), runs=runs)
    write_spec(plan.steps[0].folder, spec_of(plan.steps[0], plan.cluster))
    return plan.steps[0].folder


@pytest.mark.parametrize("name", KINDS)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert read_record(path, KINDS[name]) is None
    write_json(path, {**RECORDS[name], "a field of a later version": [1]})
    found = read_record(path, KINDS[name])
    assert found is not None
    for key, value in RECORDS[name].items():
        assert getattr(found, key) == value or key == "files"


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_whatever_a_file_holds_it_is_a_record_or_odd(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: Any
) -> None:
    record = dict(RECORDS[name])
    for key in data.draw(
        st.lists(st.sampled_from([*record, "attempt", "figures", "problems", "exit_code"]), min_size=1)
    ):
        record[key] = data.draw(VALUES)
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_text(json.dumps(record))
    found = record_or_none(path, KINDS[name])
    if found is None:
        with pytest.raises(InvalidRecord, match=f"fuzz-{name}: ") as caught:
            read_record(path, KINDS[name])
        assert len(str(caught.value)) < 400 + len(str(path))
    str(found)
    if isinstance(found, Progress):
        assert status.format_duration(found.seconds)
        assert found.eta is None or status.format_duration(found.eta)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_odd(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(data)
    assert record_or_none(path, Progress) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got an empty file; expected a JSON object"),
        ('{"stage": "sft"', "got incomplete JSON; expected a JSON object"),
        ("[" * 100_000, "got incomplete JSON; expected a JSON object"),
        ("[1]", "got a list; expected a JSON object"),
        ('{"stage": "sft"}', "state: missing; expected a text"),
        ('{"stage": "sft", "state": "running", "done": "3"}', 'done: got "3"; expected a whole number'),
        ('{"stage": "sft", "state": "running", "done": true}', "done: got true; expected a whole number"),
        ('{"stage": "sft", "state": "running", "started": Infinity}', "started: got Infinity; expected a finite"),
        ('{"stage": "sft", "state": "running", "problems": "no"}', 'problems: got "no"; expected a list'),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / PROGRESS).write_text(text)
    with pytest.raises(InvalidRecord) as caught:
        read_record(tmp_path / PROGRESS, Progress)
    assert told in str(caught.value)
    assert read_progress(tmp_path) is None


def test_a_pipe_and_a_huge_file_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "huge"):
        with pytest.raises(InvalidRecord):
            read_record(tmp_path / name, Progress)


def test_a_loss_that_is_no_number_is_still_shown(tmp_path: Path) -> None:
    ProgressFile(tmp_path, "sft").update(state="running", figures={"loss": float("nan")})
    assert str(read_progress(tmp_path).figures["loss"]) == "nan"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*KINDS, STEP])
@pytest.mark.parametrize("text", ["", "[]", '{"state": 7}', "\x00"])
def test_one_odd_file_is_a_row_and_nothing_else(tmp_path: Path, name: str, text: str) -> None:
    """Before: a traceback of status, logs, plan and cancel for all recipes."""
    runs = tmp_path / "runs"
    odd, good = step_of(runs, 1), step_of(runs, 2)
    ProgressFile(good, "preprocess").update(state="failed", problems=("rows are missing",))
    (odd / name).write_text(text)
    rows, _ = status.table(runs, everything=True)
    by_folder = {row.folder: row for row in rows}
    assert by_folder[str(good)].reasons == ("rows are missing",)
    assert str(odd / name) in " ".join(by_folder[str(odd)].reasons)
    assert by_folder[str(odd)].state in ("odd", "waiting")
    assert not is_done(odd)
    plan = make_plan(["tiny"], ["seed=1"], stages=("preprocess",), runs=runs)
    assert explain(plan.steps[0])
    assert status.cancel(rows) == []


def test_an_order_of_another_shape_is_told(tmp_path: Path) -> None:
    folder = step_of(tmp_path / "runs")
    record = read_json(folder / STEP)
    changes: list[dict[str, Any]] = [{"recipe": 3}, {"stage": "sfft"}, {"inputs": []}, {"payload": None}]
    for change in changes:
        write_json(folder / STEP, {**record, **change})
        with pytest.raises(ArtifactError, match=STEP):
            read_spec(folder)
    write_json(folder / STEP, {**record, "later": 1})
    assert read_spec(folder).name == "preprocess"


def test_who_runs_a_step_is_never_guessed(tmp_path: Path) -> None:
    """An owner or job file that cannot be used may be that of a running step."""
    (tmp_path / OWNER).write_text("")
    with pytest.raises(ArtifactError, match=r"owner.json: got an empty file.*delete"), lock(tmp_path):
        pass
    (tmp_path / slurm.JOB_FILE).write_text("{}")
    with pytest.raises(PlanError, match=r"job.json: token: missing.*squeue --me.*delete"):
        live_jobs([tmp_path])


def test_a_stale_handle_is_read_again_and_then_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESTALE: the file server has replaced the file. Before: a traceback of status."""
    runs = tmp_path / "runs"
    folder = step_of(runs)
    ProgressFile(folder, "preprocess").update(state="failed", problems=("rows are missing",))
    real, stale = Path.open, {"left": 1}

    def open_(path: Path, *words: Any, **more: Any) -> Any:
        if path.name == PROGRESS and stale["left"]:
            stale["left"] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *words, **more)

    monkeypatch.setattr(Path, "open", open_)
    assert status.table(runs)[0][0].reasons == ("rows are missing",)
    stale["left"] = 100
    (row,) = status.table(runs)[0]
    assert row.state == "odd"
    assert "progress.json: cannot be read (Stale file handle)" in row.reasons[0]


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = step_of(tmp_path / "runs")
    ProgressFile(folder, "preprocess").update(state="failed", note="\x1b]0;mine\x07", problems=("\x1b[2J",))
    (folder / "log.txt").write_bytes("50%\r100%\r\n\x1b[31mred é".encode())
    for words in (["status"], ["logs", "preprocess"]):
        done = run_cli(*words, "--runs", str(tmp_path / "runs"))
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout + done.stderr) & {"\x1b", "\x07", "\r"}
    assert done.stdout == "50%\n100%\n␛[31mred é"


def test_an_owner_of_before_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / OWNER, RECORDS[OWNER])
    owner = read_holder(tmp_path)
    assert owner is not None
    assert (owner.restart, owner.cluster) == (None, None)
