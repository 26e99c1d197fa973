"""The errors of Therefore. Each message says what, where, what was found, what would be right, how to go on.

    PipelineError                  exit code 1: a fault
    ├── RecipeError                exit code 2: a recipe, cluster or command line that cannot be right
    ├── PlanError                  exit code 2: nothing can be run as asked
    ├── ArtifactError              exit code 2: a step's folder or a checkpoint that is not what it should be
    ├── DataError                  exit code 2: rows that cannot be read
    ├── MissingDependency          exit code 2: a package or a program that is not installed
    ├── LaunchError                exit code 1: a process that could not be started, or that failed
    └── Stopped                    exit code 75: stopped as asked; the same command goes on from here

All problems are reported at once: an error carries a list, one sentence a line.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

EXIT_FAULT, EXIT_MISTAKE, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130


class PipelineError(Exception):
    """A list of problems, each one sentence on one line; `str()` joins them."""

    exit_code = EXIT_FAULT

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RecipeError(PipelineError):
    exit_code = EXIT_MISTAKE


class PlanError(PipelineError):
    exit_code = EXIT_MISTAKE


class ArtifactError(PipelineError):
    exit_code = EXIT_MISTAKE


class DataError(PipelineError):
    exit_code = EXIT_MISTAKE


class MissingDependency(PipelineError):
    exit_code = EXIT_MISTAKE


class LaunchError(PipelineError):
    pass


class Stopped(PipelineError):
    exit_code = EXIT_STOPPED


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` when a known word is close, else the known words."""
    menu = sorted(known)
    close = difflib.get_close_matches(word, menu, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(menu) or 'none'}"


def join_first(names: Sequence[str], shown: int = 3, between: str = ", ") -> str:
    """The first few of a list: `a, b, c and 9 more`."""
    more = len(names) - shown
    return between.join(names[:shown]) + (f" and {more} more" if more > 0 else "")


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of a model, a file or a job as a terminal may show it: one visible character for each control character.

    Line feeds and tabs stay. Escape sequences, carriage returns, overrides of the writing direction and lone surrogates
    lose their effect; the length stays, so a text that grows can be shown piece by piece.
    """
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 0x20 else "\ufffd", text)


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ALMOST_FULL_BYTES = 1 << 20  # bytes


def explain_disk(error: Exception, folder: Path | None = None) -> str | None:
    """A sentence for a disk that is full or may not be written; None for anything else.

    Libraries that write weights raise errors of their own for a full disk, so the disk of `folder` is asked too.
    """
    number = error.errno if isinstance(error, OSError) else None
    where = (error.filename if isinstance(error, OSError) else None) or folder or "the run's folder"
    told = any(os.strerror(code) in str(error) for code in DISK_FULL_ERRNOS)
    if (
        told
        or number in DISK_FULL_ERRNOS
        or (folder and folder.exists() and shutil.disk_usage(folder).free < ALMOST_FULL_BYTES)
    ):
        return f"no space left to write {where}: free some space or a quota, then run the same command again"
    if isinstance(error, OSError) and number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return f"{where} cannot be written ({error.strerror}): choose another place with --runs DIR"
    return None


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command line: a user's mistake is printed without a traceback and decides the exit code."""
    try:
        code = main() or 0
    except PipelineError as error:
        print("\n".join(f"error: {printable(problem)}" for problem in error.problems), file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        sentence = explain_disk(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        code = EXIT_FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
