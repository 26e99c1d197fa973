"""Verified checkpoints: a manifest that is written last, resume from the latest valid one, the ones that are kept.

A checkpoint is valid only with its manifest (files, sizes, sha256). The manifest is signed (signing.py) and covers the
training layout (layouts.py). saves.py writes them while training continues.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.core.errors import ArtifactError, LaunchError
from pipeline.core.files import read_json, sync, write_json
from pipeline.core.hashing import file_sha256, files_sha256
from pipeline.training import distributed
from pipeline.workflow.artifact import hash_files
from pipeline.workflow.layouts import Layout, layout_mismatch, saved_layout, write_layout
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.signing import MANIFEST, SIGNATURE, origin_problem, sign

VISIBLE_SECONDS = 120.0  # a network file system shows other nodes' files within a minute (acdirmax)
POLL_SECONDS = 0.2
PICKLES = (".pt", ".pth", ".pkl")  # files that a resume loads by pickle


def write_manifest(folder: Path, layout: Layout | None = None) -> None:
    """Record every file of a checkpoint. Written last, when all are on the disk: it makes the checkpoint complete."""
    if layout is not None:
        write_layout(folder, layout)
    entries = hash_files(folder, leave_out={MANIFEST, SIGNATURE})
    manifest = {name: asdict(entry) for name, entry in entries.items()}
    sign(folder, manifest)
    write_json(folder / MANIFEST, manifest, durable=True)


def validation_error(
    folder: Path, *, stop: Callable[[], bool] = lambda: False, hashes: bool = True, at_once: bool = False
) -> str | None:
    """Return why a checkpoint is not valid, or None. Reads every file, unless `stop` says otherwise or not `hashes`.

    `at_once`: many files are read together, while nothing else runs. A bad disk makes a checkpoint invalid; other
    errors of a file system are raised, because they may pass.
    """
    try:
        return _validation_error(folder, stop, hashes, at_once)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"a file of it cannot be read ({error.strerror})"


def _validation_error(folder: Path, stop: Callable[[], bool], hashes: bool, at_once: bool) -> str | None:
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        return "it is incomplete (no manifest)"
    for name, entry in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != entry.get("size"):
            return _changed(name)
    for path in folder.rglob("[!.]*"):  # DeepSpeed looks for its shards by pattern, and loads them by pickle
        if path.suffix in PICKLES and (name := path.relative_to(folder).as_posix()) not in manifest:
            return f"{name} is not in its manifest"
    found = iter(files_sha256([folder / name for name in manifest]) if hashes and at_once else ())
    for name, entry in manifest.items():
        if not hashes or stop():
            break
        if (next(found) if at_once else file_sha256(folder / name)) != entry.get("sha256"):
            return _changed(name)
    return None


def _changed(name: str) -> str:
    return f"{name} has changed since it was written"


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder by step, the oldest first; other folders are left out."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def latest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (the latest valid checkpoint or None, a message for each later one that was skipped)."""
    skipped: list[str] = []
    for checkpoint in reversed(numbered(folder)):
        problem = validation_error(checkpoint, at_once=True)
        if problem is None:
            return checkpoint, skipped
        skipped.append(f"skipped {checkpoint.name}: {problem}")
    return None, skipped


def checkpoint_to_resume(folder: Path, layout: Layout, runtime: Runtime) -> tuple[Path | None, list[str]]:
    """Return, in every process, (the checkpoint to resume from, messages about skipped ones); rank 0 verifies them.

    Where the second place has a newer one, that is restored and returned.
    Raises ArtifactError in every process for a checkpoint that another user wrote or that was trained otherwise. One
    override fixes such an error, while a silent resume from an older checkpoint would lose work.
    """

    def decide() -> tuple[str | None, list[str], dict[str, int]]:
        for checkpoint in numbered(folder):
            if problem := origin_problem(checkpoint):
                raise ArtifactError(problem)
        found, skipped = latest_valid_checkpoint(folder)
        if second := second_place(runtime.cluster.checkpoint_copy, folder.parent):
            found, restored = restore_copy(folder, second, found)
            skipped += restored
        saved = saved_layout(found) if found else None
        if found and saved and (problem := layout_mismatch(saved, layout, found)):
            raise ArtifactError(problem)
        return (str(found) if found else None), skipped, (file_sizes(found) if found else {})

    found, skipped, files = distributed.from_rank_0(decide)
    if found:
        wait_for_files(Path(found), files)
    return (Path(found) if found else None), skipped


def rotate(checkpoints: Sequence[Path], newest: Path, keep: int, best: str | None = None) -> None:
    """Delete all but the `keep` most recent of them; `newest` and the best are kept and count towards `keep`.

    `newest` has been read back; of the others the sizes are compared. Where `newest` lacks a file nothing is deleted.
    Steps later than `newest` are from an attempt whose checkpoints were invalid. They are always deleted, and so are
    checkpoints that are incomplete.
    """
    if validation_error(newest, hashes=False):
        return
    kept = {newest.name, *([Path(best).name] if best else [])}
    others = [path for path in checkpoints if path.name not in kept]
    valid = [path for path in others if _step(path) < _step(newest) and not validation_error(path, hashes=False)]
    recent = valid[len(valid) - max(0, keep - len(kept)) :] if keep > len(kept) else []
    for path in others:
        if path not in recent:
            discard(path)


def discard_incomplete(folder: Path) -> None:
    """Delete the checkpoints without a manifest."""
    for path in numbered(folder):
        if not (path / MANIFEST).exists():
            discard(path)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first: one that is partly deleted must not look complete."""
    if checkpoint.is_dir():
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


# ---------------------------------------------------------------- files of other nodes


def wait_for_files(checkpoint: Path, files: Mapping[str, int], seconds: float = VISIBLE_SECONDS) -> None:
    """Wait until this node sees every file in its full size; network file systems show other nodes' files late.

    Raises LaunchError for a file that does not appear: a manifest without it would call a torn checkpoint whole.
    """
    until = time.monotonic() + seconds
    while missing := [name for name, size in files.items() if _size(checkpoint / name) != size]:
        if time.monotonic() > until:
            raise LaunchError(
                f"{checkpoint}: {missing[0]} was written by another process and is not seen here in its full size "
                f"after {seconds:.0f} s. Fix: use a runs folder that all nodes share"
            )
        for folder in {(checkpoint / name).parent for name in missing}:
            with contextlib.suppress(OSError):
                list(folder.iterdir())  # has the client ask its server again
        time.sleep(POLL_SECONDS)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the size of each file of a checkpoint by its relative name, as this process sees them."""
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in paths}


# ---------------------------------------------------------------- the second place


def second_place(copies: str | None, out: Path) -> Path | None:
    """Return the folder of a step's copies below `cluster.checkpoint_copy`; None without one."""
    return Path(copies).expanduser() / out.parent.name / out.name if copies else None


def copy_checkpoint(checkpoint: Path, place: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Copy a committed checkpoint into a folder; it appears there whole and on the disk, or not at all.

    Raises OSError, also where the copy differs. `stop` is looked at before each file.
    """
    for left in place.glob(".checkpoint-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    manifest = read_json(checkpoint / MANIFEST)
    partial = place / f".{checkpoint.name}.partial"
    for name in [*manifest, *[name for name in (SIGNATURE, MANIFEST) if (checkpoint / name).is_file()]]:
        if stop():
            return
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / name, partial / name)
        sync(partial / name)
    for folder in {(partial / name).parent for name in manifest}:
        sync(folder)
    if problem := validation_error(partial):
        raise OSError(0, problem, str(partial))
    discard(place / checkpoint.name)
    partial.rename(place / checkpoint.name)
    sync(place)


def restore_copy(folder: Path, place: Path, found: Path | None) -> tuple[Path | None, list[str]]:
    """Copy the newest valid checkpoint of the second place back, if it is newer than `found`, the first place's.

    Returns the checkpoint to resume from and messages. The best checkpoint, which early stopping comes back to, is
    restored with it.
    """
    messages: list[str] = []
    for copy in reversed([path for path in numbered(place) if found is None or _step(path) > _step(found)]):
        if problem := origin_problem(copy) or validation_error(copy):
            messages.append(f"skipped the copy {copy}: {problem}")
            continue
        best = (read_json(copy / "trainer_state.json") or {}).get("best_model_checkpoint")
        for one in [copy, *([place / Path(best).name] if best else [])]:
            restored = folder / one.name
            if (one / MANIFEST).is_file() and (one == copy or validation_error(restored)):
                folder.mkdir(parents=True, exist_ok=True)
                copy_checkpoint(one, folder)
                messages.append(f"{one.name} is restored from {place}")
        return folder / copy.name, messages
    return found, messages
