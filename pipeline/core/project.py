"""Find the project's root from any working folder, and run the command there.

    words, typed_in = enter_project(sys.argv[1:])      the working folder is now the root

The root is `--project DIR`; else the nearest folder with `configs/`, from the working folder upwards; else the checkout
that this package was imported from. `configs/`, `deepspeed/`, `slurm/`, `runs/` and `logs/` are its folders, and every
process of a run works in it. Paths on the command line are relative to the user's folder: see `from_root`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.errors import PlanError

MARKS = ("configs/base.yaml", "configs/clusters/local.yaml")
TYPED_IN = "THEREFORE_TYPED_IN"  # the user's folder, for a process that already starts in the root
PACKAGE = Path(__file__).resolve().parent.parent


def enter_project(argv: Sequence[str], module: str = "pipeline") -> tuple[list[str], Path | None]:
    """Make the root the working folder. Returns the arguments without --project, and the user's folder if it differs.

    A root with a `pipeline/` of its own runs that code: `module` is executed again from there. The settings of one
    version do not fit the code of another. Raises PlanError without a root.
    """
    words, named = _without_project(argv)
    started_in, given = _working_folder(), os.environ.pop(TYPED_IN, None)
    typed_in = Path(given) if given else started_in
    if named is not None and not _is_root(typed_in / named):
        raise PlanError(f"--project: got {named}; expected a folder with {MARKS[0]}. Fix: --project CHECKOUT")
    root = typed_in / named if named is not None else find_root(started_in)
    if root is None:
        if {"-h", "--help", "--version"} & set(words):
            return words, None
        raise PlanError(
            f"project: got no configs/ in {started_in} or above it; expected the project's folder. "
            "Fix: cd into the checkout, or --project CHECKOUT"
        )
    os.chdir(root)
    code = Path("pipeline")
    if given is None and (code / "cli").is_dir() and not code.samefile(PACKAGE):
        os.environ[TYPED_IN] = str(typed_in)
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
    return words, None if typed_in.samefile(root) else typed_in


def find_root(folder: Path) -> Path | None:
    """Return the project that contains a folder, else the checkout of this code, else None."""
    return next((place for place in (folder, *folder.parents, PACKAGE.parent) if _is_root(place)), None)


def from_root(path: str, typed_in: Path) -> str:
    """Rewrite a path typed in another folder relative to the root. Unchanged where no file exists, as for a hub id."""
    if not path or Path(path).is_absolute() or not os.path.lexists(typed_in / path):
        return path
    folder, name = os.path.split(os.path.normpath(path))
    place = Path(os.path.realpath(typed_in / folder), name)
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


def _is_root(folder: Path) -> bool:
    return all(os.access(folder / mark, os.R_OK) for mark in MARKS)  # a folder above may be closed to this user


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise PlanError("working folder: got a deleted one; expected an existing one. Fix: cd into another") from None


def _without_project(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--project DIR`, wherever it stands, and that DIR or None."""
    words, named = list(argv), None
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == "--project":
            if not equals and index + 1 == len(argv):
                raise PlanError("--project: got nothing; expected the project's folder. Fix: --project CHECKOUT")
            named = value if equals else argv[index + 1]
            del words[index : index + (1 if equals else 2)]
            break
    return words, named
