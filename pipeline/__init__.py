"""Therefore: fine-tune language models on tasks whose answers can be checked, and measure whether each stage helped.

    YAML + overrides ─▶ Recipe ─▶ Plan[Step] ─▶ launcher ─▶ stage process ─▶ Artifact ─▶ … ─▶ report

Folders are layers: a module imports from its own folder and from those below it. tests/unit/test_layers.py reads
this table.

    cli/         the command line, one file per command group
    launchers/   start processes: local, debug, slurm, submitit, torchrun
    preflight/   every check that can run before a job is queued
    *.py         the stages and commands that users run: preprocess sft grpo evaluate report export ask
    training/    trainers, callbacks, checkpoints, process groups, the harness of a stage      (torch)
    engines/     generation: the interface, transformers, vLLM, servers of the OpenAI format    (torch)
    models/      loading, chat formats, random initialisation, checks of weights, GGUF         (torch)
    workflow/    plan, stages, artifacts, locks, progress, status
    hub/         download, upload
    sizing/      memory estimates, settings that fit, the smoke-test copy of a recipe
    rewards/     one function per reward
    tasks/       one file per task; readers of dataset files and of hub datasets
    scoring/     answer parsing, metrics, charts
    config/      recipe, cluster, loading of YAML and overrides, architectures
    core/        errors, files, hashes, typed records, the client of Slurm's commands
"""

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # a command starts: looking for garbage among its imports takes a fifth of the time
    gc.disable()  # until run_main

_FORMER = {  # folder -> modules that were `pipeline.NAME` before they moved into it (NAME=present name)
    "core": "errors files records markdown slurm_words typed=schema fingerprint=hashing slurm=slurm_client",
    "config": "recipe cluster loading=load families=model_files",
    "scoring": "answers arithmetic expressions quantities reading units verdicts metrics charts",
    "tasks": "rows row_files",
    "sizing": "memory rehearsal=smoke",
    "hub": "fetch=download push=upload",
    "workflow": "artifact progress runtime stage plan status step_folders jobs "
    "refresh task_code layouts signing faults",
    "models": "modeling=loading weight_checks template_trial to_gguf=gguf kernels",
    "engines": "generation=engine",
    "training": "training=trainer monitor=callbacks checkpoints distributed devices operators",
    "preflight": "preflight=checks",
}
MOVED = {
    old: f"pipeline.{folder}.{new or old}"
    for folder, words in _FORMER.items()
    for old, _, new in (word.partition("=") for word in words.split())
    if old not in _FORMER  # training and preflight are folders now
} | {
    f"tasks.corr2cause.{old}": f"pipeline.tasks.corr2cause.{new}"
    for old, new in {
        "said": "parse_thought",
        "trace": "proof_writer",
        "check": "proof_checker",
        "paper": "published",
        "text": "wording",
        "premise": "parse_premise",
    }.items()
}


class _Former(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import `pipeline.answers` as `pipeline.scoring.answers`, so that existing task files keep working."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = name.partition(".")
        return importlib.util.spec_from_loader(name, self) if package == "pipeline" and old in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        new = MOVED[module.__name__.partition(".")[2]]
        warnings.warn(f"{module.__name__} is now {new}", FutureWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


sys.meta_path.insert(0, _Former())


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that resolves its former names, with a FutureWarning."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}", FutureWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return find
