"""checkpoints: only a valid one is resumed from, and skipped ones are reported."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.files import read_json, write_json
from pipeline.training.checkpoints import latest_valid_checkpoint, numbered, rotate, validation_error, write_manifest
from pipeline.workflow.signing import MANIFEST


def saved(folder: Path, step: int, *, manifest: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights" * step)
    (checkpoint / "global_step" / "shard").write_bytes(b"shard")
    if manifest:
        write_manifest(checkpoint)
    return checkpoint


def test_the_newest_that_verifies_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    newest = saved(tmp_path, 10)
    assert latest_valid_checkpoint(tmp_path) == (newest, [])  # 10 comes after 2


def test_a_checkpoint_without_its_manifest_is_skipped(tmp_path: Path) -> None:
    good = saved(tmp_path, 2)
    saved(tmp_path, 4, manifest=False)
    assert latest_valid_checkpoint(tmp_path) == (good, ["skipped checkpoint-4: it is incomplete (no manifest)"])


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    good, cut, gone, changed = (saved(tmp_path, step) for step in (2, 4, 6, 8))
    (cut / "model.safetensors").write_bytes(b"weig")
    (gone / "global_step" / "shard").unlink()
    (changed / "global_step" / "shard").write_bytes(b"SHARD")
    found, passed = latest_valid_checkpoint(tmp_path)
    assert found == good
    assert passed == [
        "skipped checkpoint-8: global_step/shard has changed since it was written",
        "skipped checkpoint-6: global_step/shard is missing",
        "skipped checkpoint-4: model.safetensors has changed since it was written",
    ]


def test_a_half_written_manifest_is_none(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 2)
    (checkpoint / MANIFEST).write_text('{"model')
    assert validation_error(checkpoint) == "it is incomplete (no manifest)"
    assert latest_valid_checkpoint(tmp_path)[0] is None


def test_a_file_that_the_disk_cannot_read_makes_the_one_before_it_count(tmp_path: Path) -> None:
    """/proc/self/mem begins with an input/output error, as a bad sector does."""
    good, bad = saved(tmp_path, 2), saved(tmp_path, 4)
    (bad / "model.safetensors").unlink()
    (bad / "model.safetensors").symlink_to("/proc/self/mem")
    manifest = read_json(bad / MANIFEST)
    write_json(bad / MANIFEST, {**manifest, "model.safetensors": {"size": 0, "sha256": "?"}})
    found, skipped = latest_valid_checkpoint(tmp_path)
    assert found == good
    assert skipped == ["skipped checkpoint-4: a file of it cannot be read (Input/output error)"]


def test_no_checkpoints_are_no_checkpoint(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path / "none") == (None, [])


# ---------------------------------------------------------------- rotation


def names(folder: Path) -> list[str]:
    return [path.name for path in numbered(folder)]


def test_one_kept_checkpoint_is_deleted_after_the_next_has_its_manifest(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    new = saved(tmp_path, 4, manifest=False)  # written, not yet recorded: a node that dies here loses nothing
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-2"
    write_manifest(new)
    rotate(numbered(tmp_path), new, 1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_as_many_are_kept_as_the_cluster_says_and_the_best_among_them(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        new = saved(tmp_path, step)
    rotate(numbered(tmp_path), new, 3)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    rotate(numbered(tmp_path), new, 2, best=str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    rotate(numbered(tmp_path), new, 1, best=str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_damaged_checkpoints_of_later_steps_do_not_push_out_good_ones(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    saved(tmp_path, 10)  # of an attempt that was skipped
    saved(tmp_path, 3, manifest=False)
    (tmp_path / "checkpoint-notes").mkdir()
    new = saved(tmp_path, 4)
    rotate(numbered(tmp_path), new, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-notes").is_dir()


def test_an_odd_manifest_is_no_traceback(tmp_path: Path) -> None:
    for text in ("[]", "7", '{"model.safetensors": 3}', '{"model.safetensors": {}}'):
        checkpoint = tmp_path / "checkpoint-2"
        if not checkpoint.exists():
            saved(tmp_path, 2)
        (checkpoint / MANIFEST).write_text(text)
        assert validation_error(checkpoint) is not None
