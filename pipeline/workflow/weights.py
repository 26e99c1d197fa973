"""Which weights a checkpoint holds, found without loading them.

    find_checkpoint("runs/tiny/grpo-1a2b3c4d5e")    a step's folder, checkpoint, adapter, model folder or hub id

Whether the weights can be loaded is checked by models/weight_checks.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json
from pipeline.workflow.artifact import ARTIFACT, STEP, open_artifact

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded: a full model (`base`), or an adapter on top of one."""

    base: str  # a hub id or a folder
    adapter: Path | None
    tokenizer: str  # where its tokenizer is


def find_checkpoint(where: str) -> Checkpoint:
    """What `where` is: a step's folder, a Trainer checkpoint, an adapter, a model folder or a hub id.

    Raises ArtifactError for a folder that is missing, empty or half-written, saying what was found in it.
    """
    folder = Path(where)
    try:
        there = folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ArtifactError(f"checkpoint {where[:200]}: cannot be read ({error.strerror})") from error
    if not there:
        if where.count("/") == 1 and not where.startswith((".", "/", "~")) and not folder.parent.exists():
            return Checkpoint(where, None, where)  # a hub id: owner/name
        raise ArtifactError(f"checkpoint {where}: no such folder; give a step's folder, a checkpoint or a hub id")
    if not folder.is_dir():
        raise ArtifactError(f"checkpoint {where}: a file; give the folder that holds it ({folder.parent})")
    if (folder / ARTIFACT).exists():
        open_artifact(folder)
    elif (folder / STEP).exists():
        raise ArtifactError(
            f"checkpoint {where}: that step has not ended (no {ARTIFACT}); run it again, "
            f"or give one of its checkpoints: {_names(folder / 'checkpoints') or 'none yet'}"
        )
    for inside in ("model", "adapter"):  # a step's folder
        if (folder / inside).is_dir():
            folder = folder / inside
            break
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"checkpoint {folder}: neither config.json nor {ADAPTER} in it; it holds {_names(folder) or 'nothing'}"
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ArtifactError(
            f"checkpoint {folder}: half-written, config.json without weights ({' or '.join(WEIGHTS[:2])})"
        )
    return Checkpoint(str(folder), None, str(folder))


def _adapter(folder: Path) -> Checkpoint:
    record = read_json(folder / ADAPTER)
    base = record.get("base_model_name_or_path") if isinstance(record, dict) else None
    if not base or not isinstance(base, str):
        raise ArtifactError(f"checkpoint {folder}: {ADAPTER} is half-written or does not name its base model")
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ArtifactError(f"checkpoint {folder}: half-written, {ADAPTER} without adapter_model.safetensors")
    try:
        below = find_checkpoint(base) if not _is_adapter(Path(base)) else None
    except ArtifactError as error:
        raise ArtifactError(f"checkpoint {folder}: base_model_name_or_path: {error}") from error
    if below is None:  # also itself, and any circle of adapters
        raise ArtifactError(
            f"checkpoint {folder}: base_model_name_or_path: got {base!r}, an adapter itself; expected a whole model. "
            f"Fix: export {base} as merged16 first and name that"
        )
    return Checkpoint(below.base, folder, str(folder) if (folder / "tokenizer.json").is_file() else below.tokenizer)


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, or a step's folder with an adapter and no whole model."""
    with contextlib.suppress(OSError):  # `find_checkpoint` tells it
        return (folder / ADAPTER).exists() or (
            not (folder / "model").is_dir() and (folder / "adapter" / ADAPTER).exists()
        )
    return False


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
