"""Build and load DeepSpeed's shared-memory operator for processes on CPUs, without waiting for stale locks.

    python -m pipeline.training.operators      build it now, as scripts/setup does

torch marks a build by a file `lock` and waits for it without a limit, so the lock of a killed build would block every
later run. Here a build also holds a kernel lock (flock), which ends with its process. A `lock` that no process holds is
removed; one that is held is waited for up to a minute. The operator only speeds up the communication between
processes: without it, gloo is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import run_main

BATON = "lock"  # torch.utils.file_baton's
OWN_LOCK = ".therefore.flock"
LOCK_TIMEOUT = 60.0  # seconds
STALE_AFTER = 600.0  # seconds after which a lock on a shared disk is stale: no build takes so long
NETWORK_FILESYSTEMS = (
    *("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs"),
    *("smb", "9p", "afs", "panfs", "wekafs", "virtiofs"),
)
DIRECTORY = "TORCH_EXTENSIONS_DIR"


def extensions_folder() -> Path | None:
    """Return the Python environment's folder for compiled operators; None if it is not writable."""
    folder = Path(sys.prefix) / "torch_extensions"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None


def use_own_folder() -> None:
    """Build and load operators in the Python environment's folder, unless the user has set TORCH_EXTENSIONS_DIR."""
    if DIRECTORY not in os.environ and (folder := extensions_folder()):
        os.environ[DIRECTORY] = str(folder)


def load() -> str | None:
    """Load the operator; build it if it is missing (under a minute). Returns None, or why it cannot be loaded.

    If it fails in one process, the caller must switch it off in every process.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    use_own_folder()
    # torch searches PATH for ninja, and this Python environment may not be active
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    builder = ShareMemCommBuilder()
    try:
        folder = Path(_get_build_directory(builder.NAME, False))
        with locked(folder) as ours:
            if (busy := clear_stale(folder, ours=ours)) is not None:
                return busy
            builder.load(verbose=False)
    except TimeoutError as error:
        return str(error)
    except (RuntimeError, OSError, ImportError, ValueError, subprocess.SubprocessError) as error:
        compiler = os.environ.get("CXX", "c++")
        if not shutil.which(compiler):
            return f"no C++ compiler ({compiler})"
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def switch_off() -> None:
    """Make DeepSpeed use gloo alone in this process."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


@contextlib.contextmanager
def locked(folder: Path, seconds: float = LOCK_TIMEOUT) -> Iterator[bool]:
    """Hold the folder's flock. Yields whether it is held, because some network disks do not support it.

    Raises TimeoutError with the file's path if another process holds it for longer than `seconds`.
    """
    descriptor = os.open(folder / OWN_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _acquired(descriptor, folder / OWN_LOCK, time.monotonic() + seconds)
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, path: Path, until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"another process has held {path} for {LOCK_TIMEOUT:.0f} s. Fix: end it if it hangs, or delete it"
                ) from None
            time.sleep(0.1)
        except OSError:
            return False


def clear_stale(folder: Path, *, ours: bool, seconds: float = LOCK_TIMEOUT) -> str | None:
    """Remove torch's `lock` if its build has ended. Returns None, or an error if it still exists after `seconds`."""
    lock, until = folder / BATON, time.monotonic() + seconds
    while lock.exists():
        if _is_stale(lock, ours=ours):
            lock.unlink(missing_ok=True)
            print(f"removed {lock}, left by a build that was killed", flush=True)
            return None
        if time.monotonic() > until:
            return f"{lock} has been there for {seconds:.0f} s. Fix: delete it if no other build runs"
        time.sleep(0.1)
    return None


def _is_stale(lock: Path, *, ours: bool) -> bool:
    """Return whether a lock's build has ended: torch keeps the file open as long as it builds."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if _is_open(status):
        return False
    own = extensions_folder()
    if ours and own and lock.is_relative_to(own):
        return True  # every build in this folder holds the flock, which this process holds now
    if status.st_uid != os.getuid() and os.getuid() != 0:
        return False  # another user's open files are not visible
    return not _is_shared(lock) or time.time() - status.st_mtime > STALE_AFTER


def _is_open(status: os.stat_result) -> bool:
    """Return whether a process of this machine has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return True
    return False


def _is_shared(path: Path) -> bool:
    """Return whether other machines may have this file open: it is on a network file system, or an unknown one."""
    best, kind = "", "unknown"
    real = str(path.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, filesystem, *_ = line.split()
            if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
                best, kind = mount, filesystem
    return kind == "unknown" or kind.startswith(NETWORK_FILESYSTEMS)


def main() -> int:
    """Build the operator, or print why it cannot be built. Returns 0 in both cases, because it is optional."""
    problem = load()
    print("DeepSpeed's shared-memory operator is built" if problem is None else explain(problem), flush=True)
    return 0


def explain(problem: str) -> str:
    """Return the message for a run without the operator."""
    remedy = "To build it, install g++ and Python's headers (Debian: apt install g++ python3-dev)"
    waited = OWN_LOCK in problem or f"/{BATON} has been there" in problem  # then a compiler is not missing
    return (
        f"DeepSpeed's shared-memory operator cannot be built: {problem}; gloo is used instead, which is slower. "
        f"{'' if waited else remedy}"
    ).strip()


if __name__ == "__main__":
    run_main(main)
