"""Define the errors and exit codes of Therefore. A message reads `key: got X; expected Y. Fix: Z`.

    PipelineError                  exit code 1: a failure
    ├── RecipeError                exit code 2: an invalid recipe, cluster or command line
    ├── PlanError                  exit code 2: a request that cannot be carried out
    ├── ArtifactError              exit code 2: an invalid step folder or checkpoint
    ├── DataError                  exit code 2: rows that cannot be read
    ├── MissingDependency          exit code 2: a package or program that is not installed
    ├── DiskError                  exit code 1: a disk that is full or not writable; trying again does not help
    ├── LaunchError                exit code 1: a process that did not start, or that failed
    │   ├── Diverged               training whose loss is not finite
    │   └── LostPeer               another process of the step has failed
    ├── EndpointError              exit code 1: a server that does not answer, or answers nonsense
    └── Stopped                    exit code 75: stopped on request; the same command resumes

All problems are reported at once: an error carries a list with one problem per line.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

EXIT_FAILURE, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130


class PipelineError(Exception):
    """A list of problems, one line each; `str()` joins them."""

    exit_code = EXIT_FAILURE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecipeError(PipelineError):
    exit_code = EXIT_USAGE


class PlanError(PipelineError):
    exit_code = EXIT_USAGE


class ArtifactError(PipelineError):
    exit_code = EXIT_USAGE


class DataError(PipelineError):
    exit_code = EXIT_USAGE


class MissingDependency(PipelineError):
    exit_code = EXIT_USAGE


class DiskError(PipelineError):
    pass


class LaunchError(PipelineError):
    pass


class Diverged(LaunchError):
    """Training whose loss, gradients or weights are not finite, at a step with these rows."""

    step = 0
    rows: tuple[str, ...] = ()


class LostPeer(LaunchError):
    """Another process of the step has failed, so this one cannot continue; the cause is reported there."""


class EndpointError(PipelineError):
    pass


class Stopped(PipelineError):
    exit_code = EXIT_STOPPED


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` when a known word is close, else the known words."""
    menu = sorted(known)
    close = difflib.get_close_matches(word, menu, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(menu) or 'none'}"


def join_first(names: Sequence[str], shown: int = 3, between: str = ", ") -> str:
    """Join the first few names of a list: `a, b, c and 9 more`."""
    more = len(names) - shown
    return between.join(names[:shown]) + (f" and {more} more" if more > 0 else "")


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text of a model, a file or a job that is safe to print: each control character becomes a visible one.

    Line feeds and tabs stay. Escape sequences, carriage returns, overrides of the writing direction and lone surrogates
    lose their effect. The length stays the same, so a growing text can be printed piece by piece.
    """
    return CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text)


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ALMOST_FULL_BYTES = 1 << 20  # bytes


def explain_disk(error: Exception, folder: Path | None = None) -> str | None:
    """Return a message for a disk that is full or not writable; None for any other error.

    Libraries that write weights raise their own errors for a full disk. So the free space of `folder` is checked too.
    """
    number = error.errno if isinstance(error, OSError) else None
    where = (error.filename if isinstance(error, OSError) else None) or folder or "the run's folder"
    reported = number in DISK_FULL_ERRNOS or any(os.strerror(code) in str(error) for code in DISK_FULL_ERRNOS)
    if reported or (folder and folder.exists() and shutil.disk_usage(folder).free < ALMOST_FULL_BYTES):
        return f"no space left to write {where}. Fix: free space or quota, then run the same command again"
    if isinstance(error, OSError) and number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return f"{where}: cannot be written ({error.strerror}). Fix: choose another folder with --runs DIR"
    return None


def write_problem(folder: Path) -> str | None:
    """Return a message where a file of 1 MiB cannot be written into a folder; None where it can.

    A quota does not show in the free space of its disk, and a library's error may not name either.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(ALMOST_FULL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return explain_disk(error, folder)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and exit. A PipelineError is printed without a traceback and sets the exit code."""
    gc.enable()
    gc.freeze()  # what a command has imported stays; trainers collect often, and would look through all of it
    try:
        code = main() or 0
    except PipelineError as error:
        print("\n".join(f"error: {printable(problem)}" for problem in error.problems), file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        message = explain_disk(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = EXIT_FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
