"""A command works from any folder: the project's root is found, and typed paths are relative to where they stand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, only, run_cli

from pipeline.cli.main import name_from_root, parser
from pipeline.core.errors import PlanError
from pipeline.core.project import MARKS, enter_project, find_root, from_root
from pipeline.workflow.stage import read_spec


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, with this one's settings and code; its runs do not mix with the developer's."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("configs", "deepspeed", "pipeline"):
        (root / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as an installed package is found from anywhere
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder outside of any project, with a recipe and a file of rows in it."""
    folder = tmp_path / "else where"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "gsm8k.yaml", folder / "mine.yaml")
    shutil.copy(ROOT / "pipeline" / "tasks" / "samples" / "gsm8k.jsonl", folder / "rows.jsonl")
    return folder


ROWS = ["task.source=path", "task.path=rows.jsonl"]


def test_a_step_that_is_run_elsewhere_is_the_projects(project: Path, elsewhere: Path) -> None:
    done = run_cli("run", "mine.yaml", *ROWS, "--stages", "preprocess", "--project", "../project", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert f"1 of 1 steps to run, under {project}/runs/" in done.stderr
    step = only(project, "runs/mine/preprocess-*")
    assert not list(elsewhere.glob("runs*"))
    assert read_spec(step).recipe.task.path == str(elsewhere / "rows.jsonl")  # its process works in the root
    inside = project / "runs" / "mine"
    for words in (["status", "--json"], ["status", "--json", "--project", str(project)]):
        rows = json.loads(run_cli(*words, cwd=inside).stdout)
        assert [(row["state"], row["folder"]) for row in rows] == [("done", str(step))]
    for name in (f"./{step.name}", str(step), "mine/preprocess"):
        logs = run_cli("logs", name, cwd=inside)
        assert logs.returncode == 0, logs.stderr
        assert logs.stdout == (step / "log.txt").read_text(encoding="utf-8")


def test_a_stage_alone_is_run_elsewhere(project: Path, elsewhere: Path) -> None:
    """As torchrun starts it by hand: every rank finds the step's folder."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}

    def stage(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "pipeline.preprocess", *words]
        return subprocess.run(argv, cwd=elsewhere, env=env, capture_output=True, text=True)

    done = stage("mine.yaml", *ROWS, "--project", str(project), "--runs", "out")
    assert done.returncode == 0, done.stderr
    step = only(elsewhere, "out/mine/preprocess-*")
    assert stage("--step", str(step.relative_to(elsewhere))).stdout == f"{step} is done; nothing to do\n"


def test_a_step_has_the_same_name_wherever_it_is_typed(project: Path, elsewhere: Path) -> None:
    (project / "data").mkdir()
    shutil.copy(elsewhere / "rows.jsonl", project / "data" / "rows.jsonl")
    inside = run_cli("plan", "gsm8k", *ROWS, cwd=project / "data")
    at_root = run_cli("plan", "gsm8k", ROWS[0], "task.path=data/rows.jsonl", cwd=project)
    assert at_root.returncode == 0, at_root.stderr
    assert inside.stdout.splitlines()[:-1] == at_root.stdout.splitlines()[:-1]
    assert inside.stdout.endswith(f"under {project}/runs/\n")
    assert at_root.stdout.endswith("under runs/\n")


def test_what_is_typed_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, inside, outside = tmp_path / "root", tmp_path / "root" / "data", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").touch()
    monkeypatch.chdir(root)
    assert from_root("rows.jsonl", inside) == "data/rows.jsonl"
    assert from_root("../outside/rows.jsonl", inside.parent) == str(outside / "rows.jsonl")
    assert from_root("../data", inside) == "data"
    assert from_root("rows.jsonl", outside) == str(outside / "rows.jsonl")
    for word in ("no/such-model", "", str(inside / "rows.jsonl"), "x\0y"):  # a hub id; a path that needs no change
        assert from_root(word, outside) == word
    link = tmp_path / "link"
    link.symlink_to(inside)
    assert from_root("../outside/rows.jsonl", link.parent / "root") == str(outside / "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "renamed"),
    [
        (["run", "mine.yaml", "--cluster", "lab.yaml"], {"words": ["ELSE/mine.yaml"], "cluster": "ELSE/lab.yaml"}),
        (["run", "tiny", "--cluster", "a100"], {"words": ["tiny"], "cluster": "a100", "runs": "ROOT/runs"}),
        (["run", "tiny", "--runs", "runs"], {"runs": "ELSE/runs"}),
        (
            ["run", "tiny", "grpo.beta=0.1", "task.path=x.csv"],
            {"words": ["tiny", "grpo.beta=0.1", "task.path=ELSE/x.csv"]},
        ),
        (["run", "tiny", "task.path=no.csv"], {"words": ["tiny", "task.path=no.csv"]}),  # as it is, for the error
        (["chat", "--ckpt", "model", "--ckpt", "org/name", "?"], {"ckpt": ["ELSE/model", "org/name"], "question": "?"}),
        (["evaluate", "--ckpt", "model"], {"ckpt": "ELSE/model"}),
        (["export", "--ckpt", "model", "--format", "gguf", "--out", "new"], {"out": "ELSE/new"}),
        (["export", "--ckpt", "org/name", "--format", "gguf"], {"ckpt": "org/name", "out": "None"}),
        (["audit", "corr2cause", "--data", "x.csv"], {"data": "ELSE/x.csv"}),
        (["generate", "corr2cause", "--n", "3", "--out", "new"], {"out": "ELSE/new"}),
        (["logs", "./tiny/model"], {"step": "./tiny/model"}),
        (["status", "tiny"], {"recipes": ["tiny"], "runs": "ROOT/runs"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_that_is_a_path_is_renamed(
    words: list[str], renamed: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "else"
    root.mkdir()
    (outside / "model").mkdir(parents=True)
    for name in ("mine.yaml", "lab.yaml", "x.csv"):
        (outside / name).touch()
    monkeypatch.chdir(root)
    args = parser().parse_args(words)
    name_from_root(args, outside)
    for name, value in renamed.items():
        found = getattr(args, name)
        plain = [str(one) for one in found] if isinstance(found, list) else str(found)
        assert json.loads(json.dumps(plain).replace(str(outside), "ELSE").replace(str(root), "ROOT")) == value


def test_the_nearest_project_counts(project: Path, elsewhere: Path) -> None:
    deep = project / "a" / "b"
    deep.mkdir(parents=True)
    assert find_root(deep) == project
    assert find_root(elsewhere) == ROOT  # the checkout of this code
    assert all((ROOT / mark).is_file() for mark in MARKS)


def test_another_checkout_is_run_with_its_own_code(tmp_path: Path, elsewhere: Path, project: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "configs", other / "configs")
    shutil.copytree(ROOT / "pipeline", other / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    code = other / "pipeline" / "__init__.py"
    code.write_text(code.read_text(encoding="utf-8").replace('__version__ = "', '__version__ = "other '))
    inside = other / "configs" / "models"
    for where, words in ((elsewhere, ["--project", str(other)]), (inside, []), (inside, ["--project", "../.."])):
        done = run_cli("--version", *words, cwd=where)
        assert done.stdout.startswith("other "), done.stderr
    assert not run_cli("--version", f"--project={project}", cwd=inside).stdout.startswith("other ")


def test_without_a_project_a_command_says_what_it_needs(tmp_path: Path) -> None:
    """A package that is installed from a wheel has no checkout."""
    package = tmp_path / "site"
    shutil.copytree(ROOT / "pipeline", package / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": str(package)}
    done = run_cli("plan", "tiny", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: project: got no configs/ in {tmp_path} or above it; expected the project's folder. "
        "Fix: cd into the checkout, or --project CHECKOUT\n"
    )
    assert "--project DIR" in run_cli("--help", cwd=tmp_path, env=env).stdout
    assert run_cli("plan", "tiny", "--project", str(ROOT), cwd=tmp_path, env=env).returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "tiny", "--project", "no/such"], "error: --project: got no/such; expected a folder with configs/"),
        (["plan", "tiny", "--project"], "error: --project: got nothing; expected the project's folder"),
    ],
    ids=str,
)
def test_a_wrong_project_is_refused(words: list[str], told: str) -> None:
    done = run_cli(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert "Fix: --project CHECKOUT" in done.stderr


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(PlanError, match="working folder: got a deleted one; expected an existing one"):
        enter_project(["list"])


def test_the_script_can_be_called_from_elsewhere(elsewhere: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["bash", str(ROOT / "run_pipeline.sh"), "mine.yaml", "--no-setup", "--dry-run", "--runs", "out"]
    done = subprocess.run(words, cwd=elsewhere, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine/preprocess" in done.stdout
    assert done.stdout.endswith(f"7 of 7 steps to run, under {elsewhere}/out/\n")
