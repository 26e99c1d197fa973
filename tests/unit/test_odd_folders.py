"""One odd folder never takes down a command over others: every small file of a step, damaged in every way."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT

from pipeline.cli.main import command
from pipeline.cli.results import read_summary
from pipeline.core.errors import PipelineError, PlanError
from pipeline.core.files import read_json
from pipeline.workflow import status
from pipeline.workflow.artifact import _checked
from pipeline.workflow.plan import make_plan

pytestmark = pytest.mark.slow  # each test starts several commands

RECIPE = "tiny-smoke-test"
STEPS = ("preprocess", "sft", "grpo", "evaluate-base", "evaluate-sft", "evaluate-grpo", "report")
FILES = ("artifact.json", "progress.json", "owner.json", "job.json", "step.json", "history.json", "log.txt", "stop")
ENOUGH = 20  # seconds after which a command waits for something that never comes


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run of three stages with its report, as an earlier version left it, and logs."""
    runs = tmp_path / "runs"
    shutil.copytree(ROOT / "tests" / "fixtures" / "records-v1", runs)
    (runs / "tiny-rehearsal").rename(runs / RECIPE)
    for step in make_plan(["tiny"], smoke_test=True, runs=runs).steps:  # where this version would look for them
        (folder,) = runs.glob(f"{RECIPE}/{step.name}-*")
        folder.rename(step.folder)
    for folder in (tmp_path / "runs" / RECIPE).iterdir():
        (folder / "log.txt").write_text(f"{folder.name} has ended\n")
    return tmp_path / "runs"


@pytest.fixture
def at_once() -> Iterator[None]:
    """A command that waits (for a pipe without a writer) fails instead."""

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(ENOUGH * len(FILES))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def retyped(path: Path) -> None:
    """Every text a number, every number a text, every container the other one."""
    record = read_json(path) if path.exists() else {}
    record = record if isinstance(record, dict) else {"a": record}
    path.write_text(json.dumps({key: 7 if isinstance(value, str) else "x" for key, value in record.items()}))


def emptied(path: Path) -> None:
    record = read_json(path) if path.exists() else {}
    path.write_text(json.dumps(dict.fromkeys(record if isinstance(record, dict) else {"a": 1})))


def nested(path: Path) -> None:
    """The right fields, and inside them everything of another type."""

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(inner) for key, inner in value.items()}
        return {"z": 1} if isinstance(value, list) else [value] if isinstance(value, str) else str(value)

    path.write_text(json.dumps(other(read_json(path) if path.exists() else {})))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.exists() else b'{"sta')


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": write(b""),
    "no JSON": write(b"hello"),
    "a list": write(b"[]"),
    "no fields": write(b"{}"),
    "binary": write(bytes(range(256)) * 8),
    "zeros": write(b"\0" * 100),
    "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path.name),
    "a dangling link": lambda path: path.symlink_to("/nowhere/at/all"),
    "a pipe": os.mkfifo,
    "other types": retyped,
    "nulls": emptied,
    "other types inside": nested,
    "half": cut,
    "a terabyte": huge,
    "missing": lambda path: path.unlink(missing_ok=True),
}
REPLACES = ("a folder", "a loop", "a dangling link", "a pipe")


def damaged(path: Path, how: str) -> Callable[[], None]:
    """Damage a file; returns what puts it back."""
    kept = path.read_bytes() if path.is_file() else None
    if how in REPLACES:
        path.unlink(missing_ok=True)
    DAMAGES[how](path)

    def restore() -> None:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        if kept is not None:
            path.write_bytes(kept)

    return restore


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints, or its error: anything but a PipelineError is a traceback for the user."""
    capsys.readouterr()
    try:
        command(words)
    except PipelineError as error:
        return str(error)
    return capsys.readouterr().out


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_costs_its_own_row_at_most(runs: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before: `status` left out folders without an order, `logs` read a log whole, `plan` and `run --refresh` ended."""
    (folder,) = runs.glob(f"{RECIPE}/grpo-*")
    where = ["--runs", str(runs)]
    for name in FILES:
        restore = damaged(folder / name, how)
        rows, troubles = status.table(runs)
        mine = [row for row in rows if row.step.startswith(f"{RECIPE}/")]
        states = {Path(row.folder).name.rpartition("-")[0]: row.state for row in mine}
        assert set(states) == set(STEPS), name
        assert {state for step, state in states.items() if step != "grpo"} == {"done"}, name
        assert states["grpo"] == "done" or name == "artifact.json", name
        assert troubles == []
        assert f"{RECIPE}/{folder.name}" in said(capsys, "status", "--all", *where)
        assert len(json.loads(said(capsys, "status", "--json", *where))) == len(rows)
        assert "has ended" in said(capsys, "logs", f"{RECIPE}/sft", *where)
        if name == "log.txt" and how != "a terabyte":
            said(capsys, "logs", f"{RECIPE}/grpo", *where)
        assert "nothing is under way" in said(capsys, "cancel", "--yes", *where)
        if name in ("history.json", "log.txt", "stop"):  # which no plan reads
            restore()
            continue
        plan = said(capsys, "plan", "tiny", "--smoke-test", *where)
        assert all(f"{RECIPE}/{step}" in plan for step in STEPS), (name, plan)
        said(capsys, "run", "tiny", "--smoke-test", "--refresh", "changed", "--dry-run", *where)
        restore()


def test_a_log_larger_than_the_memory_is_shown_piece_by_piece(tmp_path: Path) -> None:
    """Before: MemoryError."""
    huge(tmp_path / "log.txt")
    (tmp_path / "small").write_bytes("é".encode() * (status.CHUNK // 2) + "aé\r\n".encode())
    assert len(next(status.follow(tmp_path / "log.txt"))) == status.CHUNK
    assert "".join(status.follow(tmp_path / "small")) == "é" * (status.CHUNK // 2) + "aé\n"


@pytest.fixture
def not_root() -> Iterator[None]:
    """What a mode forbids is not forbidden to root."""
    importlib.import_module("pipeline.launchers.local")  # Python's own folders may be open to root alone
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def open_to_all(path: Path) -> None:
    for folder in [path, *path.parents][:5]:
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)


def test_what_may_not_be_read_is_a_row_or_a_note(
    runs: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Before: a folder of another user's mode was left out in silence, and `plan` ended with an error."""
    open_to_all(runs)
    (folder,) = runs.glob(f"{RECIPE}/grpo-*")
    artifact, where = folder / "artifact.json", ["--runs", str(runs)]
    said(capsys, "check", "tiny", "--smoke-test", "seed=3", *where)  # imports what not everybody may read here
    _checked.clear()  # of this process; a mode changes neither time nor size
    artifact.chmod(0)
    (runs / "locked").mkdir(mode=0)
    request.getfixturevalue("not_root")
    rows, notes = status.table(runs)
    assert notes == [f"{runs}/locked: cannot be listed (Permission denied), so what it holds is not shown"]
    assert notes[0] in said(capsys, "status", *where)
    (row,) = [row for row in rows if row.folder == str(folder)]
    assert (row.state, row.reasons) == ("odd", (f"{artifact}: cannot be read (Permission denied)",))
    assert f"cannot run: {artifact}: cannot be read (Permission denied)" in said(
        capsys, "plan", "tiny", "--smoke-test", *where
    )
    refused = said(capsys, "run", "tiny", "--smoke-test", *where)
    assert f"{artifact}: cannot be read (Permission denied), so it is not known whether {RECIPE}/grpo is" in refused
    assert "locked: cannot be listed" in said(capsys, "logs", "locked/sft", *where)


def test_a_folder_that_may_not_be_searched_is_a_row(runs: Path, request: pytest.FixtureRequest) -> None:
    open_to_all(runs)
    (folder,) = runs.glob(f"{RECIPE}/grpo-*")
    folder.chmod(0)
    request.getfixturevalue("not_root")
    (row,) = [row for row in status.table(runs)[0] if row.folder == str(folder)]
    assert row.state == "odd"
    assert row.reasons == (f"{folder}: cannot be listed (Permission denied). Fix: chmod u+rwx, or ask whose it is",)


def test_a_runs_folder_that_may_not_be_listed_is_an_error(runs: Path, request: pytest.FixtureRequest) -> None:
    """Before: "nothing has run"."""
    open_to_all(runs)
    runs.chmod(0)
    request.getfixturevalue("not_root")
    for words in (["status"], ["status", RECIPE], ["cancel", "--yes"], ["logs", "sft"]):
        with pytest.raises(PlanError, match=r"runs: cannot be listed \(Permission denied\)"):
            command([*words, "--runs", str(runs)])


def test_things_that_are_no_steps_are_left_alone(runs: Path) -> None:
    before = [row.step for row in status.table(runs)[0]]
    (runs / "a file").write_text("")
    (runs / "loop").symlink_to(runs)
    (runs / RECIPE / "notes.txt").write_text("")
    (runs / RECIPE / "empty-0123456789").mkdir()
    (runs / RECIPE / "mine").mkdir()
    (runs / RECIPE / "mine" / "progress.json").write_text("{}")
    Path(os.fsdecode(os.fsencode(runs) + b"/\xff/sft-1")).mkdir(parents=True)
    assert [row.step for row in status.table(runs)[0]] == before


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("how", ["binary", "a folder", "a loop", "a pipe", "a terabyte", "missing"])
def test_a_report_whose_summary_is_gone_is_told(runs: Path, how: str) -> None:
    """Before: a traceback at the end of a run that had nothing to do."""
    (folder,) = runs.glob(f"{RECIPE}/report-*")
    damaged(folder / "summary.txt", how)
    told = read_summary(folder / "summary.txt")
    assert told.startswith(f"note: {folder}/summary.txt: ")
    assert f"Fix: delete {folder} and run the same command" in told


def test_an_odd_recipe_or_task_costs_its_line_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before: a traceback. A first line may not steer the terminal either."""
    (tmp_path / "good.yaml").write_text("# a\x1b[2J good one\n")
    (tmp_path / "odd.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "none.yaml").write_bytes(b"")
    monkeypatch.setattr("pipeline.config.recipe.CONFIGS", tmp_path)
    monkeypatch.setattr("pipeline.cli.data.recipe_names", lambda: ["good", "none", "odd"])
    monkeypatch.setattr("pipeline.tasks.task.task_names", lambda: ["gsm8k", "mine"])
    told = said(capsys, "list")
    assert "a␛[2J good one" in told
    assert "odd          got UTF-16; expected UTF-8" in told
    assert "gsm8k" in told
    assert "mine         cannot be used: ModuleNotFoundError: No module named 'pipeline.tasks.mine'" in told
