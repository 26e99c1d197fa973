"""signing: a checkpoint is resumed only by the user who wrote it, or who says that its origin is trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json, write_json
from pipeline.core.hashing import file_sha256
from pipeline.training.checkpoints import latest_valid_checkpoint, validation_error, write_manifest
from pipeline.workflow import signing
from pipeline.workflow.signing import MANIFEST, SIGNATURE, origin_problem


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("THEREFORE_KEY_FILE", raising=False)
    return tmp_path


def checkpoint_in(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"states")
    write_manifest(checkpoint)
    return checkpoint


def as_another_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "other"))


def test_the_key_is_made_once_and_readable_by_its_user_alone(home: Path) -> None:
    key = signing.read_key()
    path = home / "state" / "therefore" / "key"
    assert key == path.read_bytes().strip()
    assert len(key) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signing.read_key() == key
    assert [file.name for file in path.parent.iterdir()] == ["key"]


def test_an_own_checkpoint_is_resumed_and_another_users_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_in(home)
    assert origin_problem(checkpoint) is None
    as_another_user(home, monkeypatch)
    told = origin_problem(checkpoint)
    assert told is not None
    assert told.startswith(f"{checkpoint}: got the signature of another key; expected that of ")
    assert "runs the code of whoever wrote them" in told
    assert f"Fix: if you trust its origin, python -m pipeline.workflow.signing {checkpoint.parent}" in told


def test_a_replaced_file_with_a_fresh_manifest_is_refused(home: Path) -> None:
    """An attacker can compute hashes, and leave the signature away, but not sign."""
    checkpoint = checkpoint_in(home)
    (checkpoint / "optimizer.pt").write_bytes(b"malice")
    manifest = {"optimizer.pt": {"size": 6, "sha256": file_sha256(checkpoint / "optimizer.pt")}}
    write_json(checkpoint / MANIFEST, manifest)
    assert validation_error(checkpoint) is None  # whole it is
    assert origin_problem(checkpoint) is not None
    (checkpoint / SIGNATURE).unlink()
    assert "got no signature" in str(origin_problem(checkpoint))


@pytest.mark.parametrize("name", ["global_step4/zero_pp_rank_9_mp_rank_00_optim_states.pt", "rng_state_9.pth"])
def test_a_pickle_that_the_manifest_does_not_name_makes_a_checkpoint_invalid(home: Path, name: str) -> None:
    """The signature is right, and DeepSpeed would find the file by its pattern."""
    checkpoint = checkpoint_in(home)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"malice")
    assert origin_problem(checkpoint) is None
    assert validation_error(checkpoint) == f"{name} is not in its manifest"
    assert latest_valid_checkpoint(checkpoint.parent)[0] is None


def test_checkpoints_from_before_keys_stay_usable(home: Path) -> None:
    checkpoint = checkpoint_in(home)
    (checkpoint / SIGNATURE).unlink()
    signing.key_path().unlink()  # the version that signs has not run yet
    assert origin_problem(checkpoint) is None
    later = checkpoint_in(home / "copied")
    (later / SIGNATURE).unlink()
    os.utime(later / MANIFEST, (1, 1))  # an archive brings any mtime along, but no ctime
    future = signing.key_path()
    assert future.stat().st_mtime <= (later / MANIFEST).stat().st_ctime
    assert origin_problem(later) is not None


def test_a_group_shares_a_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEREFORE_KEY_FILE", str(home / "group.key"))
    checkpoint = checkpoint_in(home)
    as_another_user(home, monkeypatch)
    assert origin_problem(checkpoint) is None
    assert not (home / "other").exists()


def test_a_home_that_cannot_be_written_stops_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("no folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "file"))
    checkpoint = checkpoint_in(home)
    assert not (checkpoint / SIGNATURE).exists()
    assert origin_problem(checkpoint) is None


def test_trust_is_said_by_one_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_in(home)
    before = read_json(checkpoint / MANIFEST)
    as_another_user(home, monkeypatch)
    assert origin_problem(checkpoint)
    assert signing.main([str(home)]) == 0
    assert f"signed {checkpoint}" in capsys.readouterr().out
    assert origin_problem(checkpoint) is None
    assert read_json(checkpoint / MANIFEST) == before
    with pytest.raises(ArtifactError, match=r"got no manifest\.json; expected checkpoints"):
        signing.main([str(home / "state")])
