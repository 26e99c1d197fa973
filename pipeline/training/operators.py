"""DeepSpeed's shared-memory operator for processes on CPUs: built once, never waited for without end.

    python -m pipeline.training.operators      build it now, as scripts/setup does

torch marks a build by a file called `lock` and waits for it without a limit, so the lock of a build that was killed
would stop every later run. Here a build holds a lock of the kernel's beside it (flock), which ends with its process; a
`lock` that nobody holds is removed, and one that is held is waited for at most a minute. The operator only makes the
exchange between processes faster: where it is missing, gloo does the work.
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

BATON = "lock"  # torch.utils.file_baton's
OWN_LOCK = ".therefore.flock"
LOCK_TIMEOUT = 60.0  # seconds
STALE_AFTER = 600.0  # seconds after which a lock on a disk that other machines share is no running build's
NETWORK_FILESYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse",
    "cifs",
    "smb",
    "9p",
    "afs",
    "panfs",
    "wekafs",
    "virtiofs",
)
DIRECTORY = "TORCH_EXTENSIONS_DIR"


def extensions_folder() -> Path | None:
    """The environment's own folder for compiled operators; None where it cannot be written."""
    folder = Path(sys.prefix) / "torch_extensions"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None


def use_own_folder() -> None:
    """Build and look for operators in the environment's own folder, unless the user has named one."""
    if DIRECTORY not in os.environ and (folder := extensions_folder()):
        os.environ[DIRECTORY] = str(folder)


def load() -> str | None:
    """Load the operator, building it where it is not there yet (under a minute). Returns why that cannot be, or None.

    The caller switches the operator off in every process when it fails in one.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    use_own_folder()
    # ninja is looked for on PATH, and the environment's own may not be active
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
    """Have DeepSpeed use gloo alone in this process."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    __compatible_ops__[ShareMemCommBuilder.NAME] = False


@contextlib.contextmanager
def locked(folder: Path, seconds: float = LOCK_TIMEOUT) -> Iterator[bool]:
    """Hold the folder's flock. Yields whether it is held: some network disks have none.

    TimeoutError, naming the file, where another process holds it for longer than `seconds`.
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
    """Remove torch's `lock` where its holder is gone. Returns why it is still there after `seconds`, or None."""
    lock, until = folder / BATON, time.monotonic() + seconds
    while lock.exists():
        if _is_stale(lock, ours=ours):
            lock.unlink(missing_ok=True)
            print(f"removed {lock}, left by a build that was killed", flush=True)
            return None
        if time.monotonic() > until:
            return f"{lock} has been there for {seconds:.0f} s; if no other build runs, delete it"
        time.sleep(0.1)
    return None


def _is_stale(lock: Path, *, ours: bool) -> bool:
    """Whether a lock's holder is gone: torch keeps the file open as long as it builds."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if _is_open(status):
        return False
    own = extensions_folder()
    if ours and own and lock.is_relative_to(own):
        return True  # every build in there holds the flock, which is ours now
    if status.st_uid != os.getuid() and os.getuid() != 0:
        return False  # whether another user's process has it open cannot be seen
    return not _is_shared(lock) or time.time() - status.st_mtime > STALE_AFTER


def _is_open(status: os.stat_result) -> bool:
    """Whether a process of this machine has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return True
    return False


def _is_shared(path: Path) -> bool:
    """Whether other machines may see this file: its file system is a network's, or not known."""
    best, kind = "", "unknown"
    real = str(path.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, what, *_ = line.split()
            if (real == where or real.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
                best, kind = where, what
    return kind == "unknown" or kind.startswith(NETWORK_FILESYSTEMS)


def main() -> int:
    """Build the operator; a machine without a compiler is told what it goes without, and that is not an error."""
    why = load()
    print("DeepSpeed's shared-memory operator is built" if why is None else explain(why), flush=True)
    return 0


def explain(why: str) -> str:
    """The sentence for a run that goes without the operator."""
    remedy = "To build it, install g++ and Python's headers (Debian: apt install g++ python3-dev)"
    waited = OWN_LOCK in why or f"/{BATON} has been there" in why  # a compiler is not what it lacks
    return (
        f"DeepSpeed's shared-memory operator cannot be built: {why}; gloo is used instead, which is slower. "
        f"{'' if waited else remedy}"
    ).strip()


if __name__ == "__main__":
    sys.exit(main())
