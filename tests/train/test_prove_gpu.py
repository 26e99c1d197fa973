"""scripts/prove-gpu without a GPU: its checks in small, its table, JSON and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prove_gpu import TOTAL
from running import ROOT, is_alive

from pipeline.core.files import read_json

OWN = """
import time
from proof import Measured, Section, check

@check("two and two", "4")
def sum_(place, given):
    return Measured(str(given), given == 4)

@check("a fault", "no exception")
def fault(place):
    raise ValueError("one | two\\nthree")

@check("a figure", "no bound")
def figure(place):
    return Measured("7", None)

@check("a kernel", "it runs", needs_gpu=True)
def kernel(place):
    raise AssertionError("it was run without a GPU")

@check("a wait", "an end")
def wait(place):
    time.sleep(600)

SECTIONS = {
    "good": Section("what holds", 30, (sum_(4), figure(), kernel())),
    "bad": Section("what does not", 30, (sum_(5), fault())),
    "slow": Section("what does not end", 1, (sum_(4), wait(), figure())),
}
"""


def prove(*words: str, checks: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`scripts/prove-gpu --cpu …`, with sections of the test's own where `checks` is a folder with own.py."""
    own = ["--checks", "own"] if checks else []
    return subprocess.run(
        [sys.executable, "tests/gpu/prove_gpu.py", *words, *own],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": f".:tests/gpu:{checks or ''}", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_every_section_that_a_cpu_can_run_passes_on_one(tmp_path: Path) -> None:
    words = ["kernels", "wires-zero2", "overflow", "seven", "generation", "--ways", "nf4"]
    done = prove("--cpu", *words, "--out", str(tmp_path))
    record = read_json(tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert record["passed"] is True
    states = {
        (finding["section"], finding["what"].partition(",")[0]): finding["state"] for finding in record["findings"]
    }
    assert states == {
        ("kernels", "a product with nf4 weights equals unpacking and multiplying"): "passed",
        ("kernels", "TRL's fused head in Triton equals its torch form"): "passed",
        ("kernels", "grouped attention without flash kernels"): "passed",
        ("kernels", "keys that heads share"): "passed",
        ("wires-zero2", "SFT"): "passed",
        ("overflow", "fp16 with a loss scale that overflows"): "passed",
        ("seven", "memory of the 7B shape in nf4"): "passed",
        ("generation", "time of a decode step"): "measured",
        ("generation", "time of a decode step at 16 rows"): "skipped",
        ("generation", "the same 16 answers at batch 16 and at batch 4"): "passed",
    }
    assert "no GPU path was run" in record["device"]


def test_a_check_that_fails_shows_in_table_json_and_exit_code(own: Path) -> None:
    done = prove("--cpu", "good", "bad", "--out", str(own / "out"), checks=own)
    assert done.returncode == 1, done.stderr
    assert "| bad | two and two, 5 | 4 | 5 | **FAILED** |" in done.stdout
    assert "| bad | a fault | no exception | ValueError: one \\| two | **FAILED** |" in done.stdout
    assert "| good | a kernel | it runs | not run: needs a GPU | skipped |" in done.stdout
    assert (own / "out" / "table.md").read_text() in done.stdout
    record = read_json(own / "out" / "results.json")
    assert record["passed"] is False
    assert [finding["state"] for finding in record["findings"]] == ["passed", "measured", "skipped", "failed", "failed"]
    assert "raise ValueError" in record["findings"][-1]["facts"]["traceback"]
    assert prove("--cpu", "good", "--out", str(own / "out"), checks=own).returncode == 0


def test_a_section_that_does_not_end_is_ended_and_fails(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = prove("--cpu", "slow", "--out", str(own / "out"), checks=own)
    assert done.returncode == 1
    assert "| slow | two and two, 4 | 4 | 4 | passed |" in done.stdout
    assert f"| slow | a wait | an end | not finished after 6 s; see {own}/out/slow.log | **FAILED** |" in done.stdout
    assert "| slow | a figure | no bound | not finished" in done.stdout


def test_a_proof_that_is_killed_leaves_no_section_behind(own: Path) -> None:
    command = [sys.executable, "tests/gpu/prove_gpu.py", "--cpu", "slow", "--checks", "own", "--out", str(own / "out")]
    env = {**os.environ, "PYTHONPATH": f".:tests/gpu:{own}", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while not (own / "out" / "slow.jsonl").is_file():  # of the check before the one that waits
        assert process.poll() is None
        assert time.time() < until
        time.sleep(0.1)
    (section,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while is_alive(int(section)):
        assert time.time() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kernel", "--cpu"], "section: got 'kernel'; did you mean 'kernels'?"),
        (["--cpu", "--ways", "nf5"], "--ways: got 'nf5'; did you mean 'nf4'?"),
        (["kernels"], "Fix: run this on a node with a GPU, or scripts/prove-gpu --cpu"),
    ],
)
def test_misuse_ends_with_a_sentence_and_code_2(words: list[str], told: str) -> None:
    done = prove(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_document_names_every_section() -> None:
    done = prove("--list")
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(names) == 9
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines()) <= TOTAL
    assert all(f"`{name}`" in text for name in names)
    assert "scripts/prove-gpu" in (ROOT / "README.md").read_text(encoding="utf-8")
