"""Run a plan's steps in this process, one after another, so that a debugger stops in a stage.

    python -m pdb -m pipeline run tiny --launcher debug

A step runs as the one process of its stage (`cluster.processes` is 1). Harness and folder are those of the other
launchers. Its output goes to the terminal, not to log.txt, and an unexpected exception keeps its traceback. After each
stage the process is reset, so that another can follow: the environment, the process group, and the state of
accelerate, transformers and DeepSpeed. Ctrl-C interrupts without saving.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping

from pipeline.core import stopwatch
from pipeline.launchers.torchrun import environment, single_rank
from pipeline.training.harness import run_spec
from pipeline.workflow import faults
from pipeline.workflow.plan import Plan, Step, spec_of
from pipeline.workflow.stage import write_spec

# read when a process starts, or valid for a child process alone
START_ONLY = ("PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONWARNINGS", faults.PARENT)


def run_step(step: Step, plan: Plan, title: str) -> None:
    """Run a step in this process. Raises the exception of its stage."""
    stage = step.runs_as
    write_spec(step.folder, spec_of(step, plan.cluster))
    settings = environment(stage, plan.cluster, step.folder)
    wanted = {name: value for name, value in settings.items() if name not in START_ONLY}
    print(f"{title} …", file=sys.stderr, flush=True)
    ranks = single_rank() if stage.processes == "all" else {}
    with _environment({**wanted, **ranks}), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # as PYTHONWARNINGS does for processes
            warnings.simplefilter("ignore", kind)
        stopwatch.begin()
        module = importlib.import_module(stage.module)
        try:
            run_spec(step.folder, module.run)
        finally:
            if "pipeline.training.distributed" in sys.modules:
                sys.modules["pipeline.training.distributed"].reset()


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and restore the whole environment at the end: libraries write to it too."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
