"""Have TRL's fused head score only what has a label; check that Triton can compile it; set the folder of its cache.

On CUDA, TRL computes log-probabilities with a Triton kernel and does not fall back if that fails. Triton compiles its
launchers with a C compiler and Python.h, which a compute node may lack although the login node has them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

PROGRAM = "#include <Python.h>\n#include <stdlib.h>\nint main(void) { return PY_MAJOR_VERSION == 0; }\n"


def choose_head() -> None:
    """Make TRL compute the head with torch if Triton cannot compile on this node; keep Triton's cache on a local disk.

    Called in every process of a training stage, before its model is built. Prints one message per node.
    """
    # whether TRL scores only tokens that have a label: without Triton it scores prompts and padding, too
    utils._use_triton = lambda device: True
    if not torch.cuda.is_available() or not chunked_logprob._TRITON_AVAILABLE:
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(private_folder("therefore-triton")))
    problem = triton_problem()
    if problem is None:
        return
    chunked_logprob._TRITON_AVAILABLE = False
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"Triton cannot compile on this node: {problem}; torch computes the head instead, which is slower. "
            "Fix: load a compiler module, or install gcc and Python's headers (Debian: apt install gcc python3-dev)",
            flush=True,
        )


def triton_problem() -> str | None:
    """Compile a file as Triton does. Returns why that fails on this machine, or None."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler (gcc or clang on PATH, or CC)"
    headers = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "try.c").write_text(PROGRAM, encoding="utf-8")
        command = [*compiler.split(), "-shared", "-fPIC", f"-I{headers}", "try.c", "-o", "try.so"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C compiler {compiler} cannot be run ({error})"
    if done.returncode == 0:
        return None
    if not (Path(headers) / "Python.h").is_file():
        return f"no Python.h in {headers}"
    return f"{compiler} fails ({(done.stderr.strip().splitlines() or ['no message'])[0]})"


def private_folder(name: str) -> Path:
    """Return this user's folder `<tmp>/<name>-<uid>` on the node's disk; a new one if another user owns that.

    Compiled code is loaded from it, so no other user may have write access.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):  # a file, a link, or the folder of an earlier run: checked next
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))
