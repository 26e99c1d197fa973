"""The scripts that set up and start: nothing is done twice, and a user's own environment is respected."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from running import ROOT


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


def test_setup_does_nothing_in_no_time_when_all_is_there(tmp_path: Path) -> None:
    stamp = "cat pyproject.toml constraints.txt scripts/setup | cksum"
    (tmp_path / ".therefore").write_text(subprocess.check_output(stamp, shell=True, cwd=ROOT, text=True))
    started = time.perf_counter()
    done = run("scripts/setup", THEREFORE_VENV=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert time.perf_counter() - started < 1
    assert [path.name for path in tmp_path.iterdir()] == [".therefore"]


def test_an_active_environment_is_used_as_it_is(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["tiny", "--no-setup", "--dry-run", "--runs", str(tmp_path)]
    done = run("run_pipeline.sh", *words, PATH=path, THEREFORE_VENV=str(tmp_path / "not made"))
    assert done.returncode == 0, done.stderr
    assert "7 of 7 steps to run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_recipe_the_pipeline_says_what_it_needs(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run("run_pipeline.sh", "--no-setup", PATH=path)
    assert "RECIPE" in done.stdout
    assert "--skip-sft" in done.stdout


def test_ci_runs_the_tests_of_the_readme() -> None:
    assert "bash scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert "bash scripts/test" in (ROOT / "README.md").read_text()
    assert "bash run_pipeline.sh tiny" in (ROOT / "README.md").read_text()


def test_every_recipe_begins_with_who_it_is_for_and_how_to_run_it() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert head, path.name
        if path.stem != "base":
            assert any(f"bash run_pipeline.sh {path.stem}" in line for line in head)
        assert yaml.safe_load(path.read_text())
