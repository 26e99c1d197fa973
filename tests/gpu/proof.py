"""What a proof on a GPU is made of: checks, sections, and what a check measured. See scripts/prove-gpu."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

P = ParamSpec("P")


@dataclass(frozen=True)
class Place:
    """Where the checks run. `work` is a scratch folder that the sections share; `small` asks for small shapes."""

    work: Path
    gpu: bool

    @property
    def small(self) -> bool:
        return not self.gpu

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class Measured:
    """What a check found. `passed` is None for a figure that has no bound; `facts` go to the JSON."""

    got: str
    passed: bool | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    expected: str
    measure: Callable[[Place], Measured]
    needs_gpu: bool = False


def check(
    what: str, expected: str, *, needs_gpu: bool = False
) -> Callable[[Callable[Concatenate[Place, P], Measured]], Callable[P, Check]]:
    """Make a function of a place a check: `what` and `expected` are its columns of the table.

    The decorated function takes the other arguments and returns the Check; `what` names those arguments.
    """

    def decorate(measure: Callable[Concatenate[Place, P], Measured]) -> Callable[P, Check]:
        @wraps(measure)
        def bind(*args: P.args, **kwargs: P.kwargs) -> Check:
            name = ", ".join([what, *map(str, args)])
            return Check(name, expected, lambda place: measure(place, *args, **kwargs), needs_gpu)

        return bind

    return decorate


@dataclass(frozen=True)
class Section:
    """Checks that run in one process. `limit` is in seconds, on a GPU."""

    about: str
    limit: int
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Finding:
    """A line of the table as it is printed and kept. `state`: passed, failed, measured (no bound) or skipped."""

    section: str
    what: str
    expected: str
    got: str
    state: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def one_process() -> dict[str, str]:
    """The environment that torchrun gives the only process of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
