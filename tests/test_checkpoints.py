"""checkpoints: only what verifies is resumed from, and what was passed over is said."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints import MANIFEST, damage, newest_good, write_manifest


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
    assert newest_good(tmp_path) == (newest, [])  # 10 comes after 2


def test_a_checkpoint_without_its_manifest_is_passed_over(tmp_path: Path) -> None:
    good = saved(tmp_path, 2)
    saved(tmp_path, 4, manifest=False)
    assert newest_good(tmp_path) == (good, ["passed over checkpoint-4: it was not written to its end"])


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    good, cut, gone, changed = (saved(tmp_path, step) for step in (2, 4, 6, 8))
    (cut / "model.safetensors").write_bytes(b"weig")
    (gone / "global_step" / "shard").unlink()
    (changed / "global_step" / "shard").write_bytes(b"SHARD")
    found, passed = newest_good(tmp_path)
    assert found == good
    assert passed == [
        "passed over checkpoint-8: global_step/shard is not what was written",
        "passed over checkpoint-6: global_step/shard is missing",
        "passed over checkpoint-4: model.safetensors is not what was written",
    ]


def test_a_half_written_manifest_is_none(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 2)
    (checkpoint / MANIFEST).write_text('{"model')
    assert damage(checkpoint) == "it was not written to its end"
    assert newest_good(tmp_path)[0] is None


def test_no_checkpoints_are_no_checkpoint(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "none") == (None, [])
