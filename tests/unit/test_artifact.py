"""artifact: a step is done exactly when its record is there and true; one live process owns a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json, read_lines, write_json
from pipeline.workflow.artifact import ARTIFACT, Artifact, finalize, is_done, open_artifact
from pipeline.workflow.lock import OWNER, holds_lock, is_alive, lock, read_holder


def made(folder: Path) -> Artifact:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"123")
    (folder / "log.txt").write_text("noise")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "big").write_text("x")
    return finalize(Artifact("sft", "sft", "tiny", "abc", {"a": 1}, {"data": "x"}, {}, {"loss": 0.5}, {}, folder))


def test_what_was_committed_is_opened(tmp_path: Path) -> None:
    assert not is_done(tmp_path)
    artifact = made(tmp_path)
    assert is_done(tmp_path)
    assert open_artifact(tmp_path, deep=True) == artifact
    assert list(artifact.files) == ["model/weights"]  # neither the log nor checkpoints are the result
    assert artifact.files["model/weights"].size == 3


def test_a_step_that_has_not_ended_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="that step has not ended; run it again"):
        open_artifact(tmp_path)


def test_a_half_written_record_is_told(tmp_path: Path) -> None:
    made(tmp_path)
    text = (tmp_path / ARTIFACT).read_text()
    (tmp_path / ARTIFACT).write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="got incomplete JSON"):
        open_artifact(tmp_path)


@pytest.mark.parametrize(("change", "told"), [("gone", "missing"), ("longer", "4 bytes, recorded as 3")])
def test_a_damaged_file_is_named(tmp_path: Path, change: str, told: str) -> None:
    made(tmp_path)
    file = tmp_path / "model" / "weights"
    file.unlink() if change == "gone" else file.write_bytes(b"1234")
    with pytest.raises(ArtifactError, match=told):
        open_artifact(tmp_path)


def test_changed_content_of_the_same_size_is_found_by_its_hash(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "model" / "weights").write_bytes(b"124")
    open_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="its content is not what was recorded"):
        open_artifact(tmp_path, deep=True)


def test_a_record_of_another_version_is_told(tmp_path: Path) -> None:
    made(tmp_path)
    record = read_json(tmp_path / ARTIFACT)
    write_json(tmp_path / ARTIFACT, {**record, "shape": 1})  # a field that a later version has
    assert open_artifact(tmp_path).stage == record["stage"]
    del record["provenance"]
    write_json(tmp_path / ARTIFACT, record)
    with pytest.raises(ArtifactError, match=r"provenance: missing; expected a mapping.*Fix: run the step again"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "sft"}', '{"stage": 1' + "0" * 5000 + "}"])
def test_an_artifact_that_cannot_be_used_is_none_for_everybody(tmp_path: Path, text: str) -> None:
    made(tmp_path)
    assert is_done(tmp_path)
    (tmp_path / ARTIFACT).write_text(text)
    assert not is_done(tmp_path)
    with pytest.raises(ArtifactError, match="counts as none"):
        open_artifact(tmp_path)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_one_process_owns_a_folder(tmp_path: Path) -> None:
    with lock(tmp_path) as owner:
        assert holds_lock(tmp_path, owner)
        with (
            pytest.raises(ArtifactError, match=f"is being written by process {os.getpid()} on .*delete"),
            lock(tmp_path),
        ):
            raise AssertionError("owned twice")
    assert not (tmp_path / OWNER).exists()


def test_a_dead_owner_is_replaced_and_fenced(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from pipeline.workflow.lock import lock\n"
        "held = lock(Path(sys.argv[1])); held.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    dead = read_holder(tmp_path)
    assert dead is not None
    assert not is_alive(dead)
    with lock(tmp_path) as owner:
        assert holds_lock(tmp_path, owner)
        assert not holds_lock(tmp_path, dead)  # a zombie of the old attempt sees that it must not write


def test_a_pid_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    with lock(tmp_path) as owner:
        assert is_alive(owner)
        assert not is_alive(replace(owner, started=owner.started + 1))
        assert is_alive(replace(owner, host="elsewhere"))  # cannot be seen from here


def test_the_owner_file_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    with lock(tmp_path) as owner:
        write_json(tmp_path / OWNER, {**read_json(tmp_path / OWNER), "token": "successor"})
        assert not holds_lock(tmp_path, owner)
    assert (tmp_path / OWNER).exists()


def test_records_are_read_by_line_whatever_a_model_writes(tmp_path: Path) -> None:
    """U+2028, U+0085 and their like end a line for `str.splitlines`, not for JSON; a cut last line is left out."""
    records = [{"text": f"a{mark}b"} for mark in "\u2028\u2029\x85\x0b\x0c\r\n"]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "records.jsonl").write_bytes((lines + '{"text": "cu').encode())
    assert read_lines(tmp_path / "records.jsonl") == records
