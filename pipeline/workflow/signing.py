"""Sign the manifests of checkpoints with a secret of the user, so that a run resumes the user's own checkpoints only.

    python -m pipeline.workflow.signing runs/tiny/sft-1a2b3c4d5e     sign the checkpoints of a folder that you trust

DeepSpeed loads optimizer states by pickle, so resuming a checkpoint runs the code of whoever wrote it. A manifest of
hashes shows that a checkpoint is complete, not where it came from. The secret is made on first use, with mode 0600, in
$XDG_STATE_HOME/therefore/key (~/.local/state/therefore/key). THEREFORE_KEY_FILE names another file, such as one that a
group shares with a runs folder. Weights that are only evaluated, exported or used in a chat are safetensors and need
no signature. `checkpoints.validation_error` compares the files with the manifest; this module does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, PlanError, run_main
from pipeline.core.files import read_json, write_json
from pipeline.core.hashing import canonical_json

MANIFEST = "manifest.json"
SIGNATURE = "manifest.hmac"
KEY_FILE = "THEREFORE_KEY_FILE"
KEY_BYTES = 32


def key_path() -> Path:
    """Return the path of the secret."""
    if named := os.environ.get(KEY_FILE):
        return Path(named).expanduser()
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path("~/.local/state").expanduser()) / "therefore" / "key"


def read_key() -> bytes | None:
    """Return the secret, made on first use; None where its folder cannot be written."""
    path = key_path()
    for _ in range(2):
        with contextlib.suppress(OSError, RuntimeError):
            if key := path.read_bytes().strip():
                return key
        with contextlib.suppress(OSError, RuntimeError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(KEY_BYTES) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)  # one of two processes that begin together wins, and both read its key
            finally:
                temporary.unlink(missing_ok=True)
    return None


def sign(checkpoint: Path, manifest: Any) -> None:
    """Write the signature of a manifest that is about to be written; without a key write nothing."""
    if key := read_key():
        write_json(checkpoint / SIGNATURE, {"hmac_sha256": _signature(key, manifest)}, durable=True)


def _signature(key: bytes, manifest: Any) -> str:
    return hmac.new(key, canonical_json(manifest).encode(), hashlib.sha256).hexdigest()


def origin_problem(checkpoint: Path) -> str | None:
    """Explain why this user may not resume a checkpoint; None where this user wrote it.

    Older manifests have no signature. Such a one counts when this user owns the file and it was on this disk before
    the key was made (`ctime`, which an archive does not restore).
    """
    manifest = read_json(checkpoint / MANIFEST)
    if manifest is None:
        return None  # incomplete: `checkpoints.validation_error` reports that
    key, record = read_key(), read_json(checkpoint / SIGNATURE)
    signature = record.get("hmac_sha256") if isinstance(record, dict) else None
    if isinstance(signature, str) and key and hmac.compare_digest(_signature(key, manifest), signature):
        return None
    if signature is None and _is_older(checkpoint / MANIFEST, key):
        return None
    got = "no signature" if signature is None else "the signature of another key"
    return (
        f"{checkpoint}: got {got}; expected that of {key_path()}. Resuming loads pickled optimizer states, which runs "
        f"the code of whoever wrote them. Fix: if you trust its origin, python -m pipeline.workflow.signing "
        f"{checkpoint.parent} (or set {KEY_FILE} to a key that you share); else delete "
        f"{checkpoint.parent} to start this step again"
    )


def _is_older(manifest: Path, key: bytes | None) -> bool:
    """Return whether a manifest is this user's own and older than the key."""
    status = manifest.stat()
    if status.st_uid != os.getuid():
        return False
    return key is None or status.st_ctime <= key_path().stat().st_mtime


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise PlanError("usage: python -m pipeline.workflow.signing DIR: a step's folder, its checkpoints/ or one")
    folder = Path(argv[0])
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: got no folder; expected a step's folder or a checkpoint. Fix: name one")
    found = [path.parent for pattern in ("", "*/", "*/*/") for path in sorted(folder.glob(pattern + MANIFEST))]
    if not found:
        raise ArtifactError(f"{folder}: got no {MANIFEST}; expected checkpoints. Fix: name a folder that holds some")
    if read_key() is None:
        raise ArtifactError(f"{key_path()}: cannot be written. Fix: set {KEY_FILE} to a file that you can write")
    for checkpoint in found:
        sign(checkpoint, read_json(checkpoint / MANIFEST))
        print(f"signed {checkpoint}: resuming it runs the code that is in its optimizer states")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
