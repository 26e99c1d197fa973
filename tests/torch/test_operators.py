"""operators: the lock of a build that was killed is removed; one that is held costs a minute at most, and is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

from pipeline.launchers.torchrun import single_rank
from pipeline.training import operators
from pipeline.training.operators import BATON, clear_stale, locked

BUILD = """\
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(60)
"""


@pytest.fixture
def building(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A build by torch's own code, in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / BATON)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_builds_lock_is_removed(
    tmp_path: Path, building: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    building.kill()
    building.wait()
    assert (tmp_path / BATON).exists()  # what stopped every later run
    assert clear_stale(tmp_path, ours=True) is None
    assert not (tmp_path / BATON).exists()
    assert str(tmp_path / BATON) in capsys.readouterr().out


def test_a_running_builds_lock_is_waited_for_and_then_named(tmp_path: Path, building: subprocess.Popen[str]) -> None:
    why = clear_stale(tmp_path, ours=True, seconds=1)
    assert why == f"{tmp_path / BATON} has been there for 1 s. Fix: delete it if no other build runs"
    assert (tmp_path / BATON).exists()
    building.send_signal(signal.SIGKILL)
    building.wait()
    assert clear_stale(tmp_path, ours=True, seconds=1) is None


def test_a_lock_that_another_machine_may_hold_is_removed_only_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_is_shared", lambda path: True)
    (tmp_path / BATON).touch()
    assert clear_stale(tmp_path, ours=True, seconds=0.3) is not None
    monkeypatch.setattr(operators, "extensions_folder", lambda: tmp_path)  # where every build holds the flock
    assert clear_stale(tmp_path, ours=True, seconds=0.3) is None
    monkeypatch.setattr(operators, "extensions_folder", lambda: None)
    (tmp_path / BATON).touch()
    os.utime(tmp_path / BATON, (time.time() - 3600,) * 2)
    assert clear_stale(tmp_path, ours=False, seconds=0.3) is None


def test_the_flock_ends_with_its_process_and_is_named_while_it_is_held(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.training.operators import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match=operators.OWN_LOCK), locked(tmp_path, seconds=0.3):
        raise AssertionError("held twice")
    process.kill()
    process.communicate()
    with locked(tmp_path, seconds=5) as ours:
        assert ours


def test_file_systems_of_this_machine_alone_are_told_from_a_networks(tmp_path: Path) -> None:
    assert not operators._is_shared(Path("/dev/shm"))
    assert "nfs4".startswith(operators.NETWORK_FILESYSTEMS)
    assert not any(
        kind.startswith(operators.NETWORK_FILESYSTEMS) for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs")
    )


def test_operators_lie_in_the_environment_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(operators.DIRECTORY, raising=False)
    operators.use_own_folder()
    assert Path(os.environ[operators.DIRECTORY]) == Path(sys.prefix) / "torch_extensions"
    monkeypatch.setenv(operators.DIRECTORY, "/elsewhere")
    operators.use_own_folder()
    assert os.environ[operators.DIRECTORY] == "/elsewhere"


def test_setup_builds_the_operator_beside_a_stale_lock(tmp_path: Path) -> None:
    """The command of scripts/setup, where a compiler is; without one it says what the runs go without."""
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / BATON).touch()
    env = {**os.environ, operators.DIRECTORY: str(tmp_path), "DS_ACCELERATOR": "cpu", "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "pipeline.training.operators"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"removed {folder / BATON}" in done.stdout
    assert "cannot be built: no C++ compiler (no-such-compiler); gloo is used instead" in done.stdout


MUON = """\
from pipeline.training import distributed
distributed.start(deepspeed=True)
from deepspeed.runtime.zero.muon import original_muon
print("compiled" if hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable") else "eager")
"""


def test_muons_products_are_not_compiled_on_a_cpu() -> None:
    """That would take half a minute of a first start, and gain nothing."""
    settings = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **single_rank()}
    done = subprocess.run(
        [sys.executable, "-c", MUON], env={**os.environ, **settings}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "eager", done.stderr
