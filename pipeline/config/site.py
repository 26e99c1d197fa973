"""What a site wants of a job: the part `slurm` of a cluster's file, and what in it cannot be.

    slurm.environment: {HF_HOME: $SCRATCH/hf}      filled in within the job; `references` lists the names
    slurm.pass_environment: [HF_TOKEN]             secrets go by name, and are written into no file

Everything here ends in a batch script: launchers/batch_script.py quotes it, `site_problems` refuses what has no
place there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.core.schema import Constraint, PositiveInt, added

TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")


def minutes(time: str) -> int:
    """`12h`, `1d6h`, `90m`, `12:00:00`, `1-06:00:00` in minutes, rounded up; 0 where it is none of them."""
    found = TIME.fullmatch(time)
    if not found:
        return 0
    day, hour, minute, second, *short = (int(part or 0) for part in found.groups())
    return (day + short[0]) * 1440 + (hour + short[1]) * 60 + minute + short[2] + (second > 0)


A_TIME = "a time such as 12h, 90m or, in quotes, '12:00:00' (without them YAML reads a number)"
Time = Annotated[str, Constraint(A_TIME, lambda v: minutes(v) > 0)]
A_MODULE = "a text. Fix: write it in quotes, such as '2023.10' (without them YAML reads a number and drops its zeros)"
Module = Annotated[str, Constraint(A_MODULE, bool)]


@dataclass(frozen=True)
class Times:
    """How long each stage's job may run before it has to save and queue again."""

    preprocess: Time
    sft: Time
    grpo: Time
    evaluate: Time
    report: Time
    export: Time


# seconds before its limit that a stage is asked to save, before anything is measured: more than a step takes
SIGNAL_BEFORE_LIMIT = {"preprocess": 120, "sft": 300, "grpo": 1200, "evaluate": 600, "report": 120, "export": 120}


SHORTEST_SIGNAL = 60  # seconds; Slurm sends signals up to 10 s off, and a node under load needs its time


@dataclass(frozen=True)
class SignalBeforeLimit:
    """Seconds before the limit at which each stage is signalled to save; auto, or None: see `Slurm.save_seconds`."""

    preprocess: PositiveInt | Literal["auto"] | None = None
    sft: PositiveInt | Literal["auto"] | None = None
    grpo: PositiveInt | Literal["auto"] | None = None
    evaluate: PositiveInt | Literal["auto"] | None = None
    report: PositiveInt | Literal["auto"] | None = None
    export: PositiveInt | Literal["auto"] | None = None


@dataclass(frozen=True)
class Slurm:
    """What a job asks Slurm for, and how its node is set up; null leaves it to the site."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gpu_type: str | None
    cpus: PositiveInt | None  # of each node, shared by its processes
    memory: str | None  # of each node, such as 64G
    time: Times
    # seconds before the limit at which a step must save; auto: as long as its own steps and saves take
    signal_before_limit: PositiveInt | Literal["auto"] | SignalBeforeLimit
    extra_sbatch_args: tuple[str, ...]  # further options of sbatch, such as --exclude=node7
    modules: tuple[Module, ...]  # loaded on the node before Python starts
    environment: dict[str, str]  # variables of the job; $NAME in a value is filled in there
    venv: str | None  # its virtual environment; null: the one that submits
    clusters: str | None = added(None)  # the cluster to submit to, by sbatch --clusters, where a site has several
    gpu_request: Literal["gres", "gpus-per-node", "none"] = added("gres")  # the option by which GPUs are asked for
    setup: tuple[str, ...] = added(())  # shell lines before modules are loaded; one that fails ends the job
    srun: tuple[str, ...] = added(())  # further options of srun
    wrapper: tuple[str, ...] = added(())  # words before python in the job, such as apptainer exec --nv IMAGE
    pass_environment: tuple[str, ...] = added(())  # variables of the submitting shell that are passed and never written
    host_suffix: str | None = added(None)  # what makes a node's name that of its fast network, such as -ib
    interface: str | None = added(None)  # the network interface of NCCL and gloo, such as ib0

    def save_seconds(self, stage: str, measured: float | None = None) -> int:
        """Return how many seconds before its time limit a stage is asked to save.

        `measured`: what a step and a save need, by an earlier attempt; without one the stage's default stands in.
        """
        if fixed := self.fixed_save_seconds(stage):
            return fixed
        limit = minutes(getattr(self.time, stage)) * 60
        if measured is None:
            return min(SIGNAL_BEFORE_LIMIT[stage], limit // 4)
        return min(max(SHORTEST_SIGNAL, round(measured)), limit // 2)

    def fixed_save_seconds(self, stage: str) -> int | None:
        """Return the number that the cluster's file gives for a stage; None where it follows from measured times."""
        given = self.signal_before_limit
        value = getattr(given, stage) if isinstance(given, SignalBeforeLimit) else given
        return value if isinstance(value, int) else None

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the job: those of `environment`, and what follows from `interface`."""
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        return (dict.fromkeys(names, self.interface) if self.interface else {}) | self.environment


# ---------------------------------------------------------------- $NAME in a value

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
REFERENCE = re.compile(rf"\$(?:({NAME})|\{{({NAME})\}})")
COMMAND = re.compile(rf"\$\(|`|\$\{{(?!{NAME}\}})")  # what only a shell could fill in


def parts(value: str) -> Iterator[tuple[str, str]]:
    """A value as ("text", …) and ("name", …), where a name stands for a variable of the job. A leading ~ is HOME."""
    if value == "~" or value.startswith("~/"):
        yield "name", "HOME"
        value = value[1:]
    end = 0
    for found in REFERENCE.finditer(value):
        yield "text", value[end : found.start()]
        yield "name", found[1] or found[2]
        end = found.end()
    yield "text", value[end:]


def references(value: str) -> list[str]:
    """The variables that a value refers to, each once."""
    return list(dict.fromkeys(text for kind, text in parts(value) if kind == "name"))


# ---------------------------------------------------------------- secrets

SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)S?$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-|sk-)\w{16,}|://[^/@\s:]*:[^/@\s]+@")
NO_SECRET = re.compile(r"0|1|true|false|yes|no|on|off||[~/$].*", re.IGNORECASE)  # a switch, a path, a reference
ASSIGNED = re.compile(rf"\b({NAME})=(\S*)")


def is_secret(name: str, value: str) -> bool:
    """Whether a variable holds what nobody else may read, by its name or by the form of its value."""
    named = SECRET_NAME.search(name) and not NO_SECRET.fullmatch(value.strip("'\""))
    return bool(named or SECRET_VALUE.search(value))


# ---------------------------------------------------------------- what cannot be


def site_problems(slurm: Slurm, *, submits: bool) -> list[str]:
    """What of these settings no job could be made of, as sentences. The value of a secret is never shown."""
    found = [*_unprintable(slurm), *_environment_problems(slurm)]
    for option in slurm.extra_sbatch_args:
        try:
            words = option_words(option)
        except ValueError as error:
            found.append(f"cluster.slurm.extra_sbatch_args: got {option!r} ({error}); expected an option of sbatch")
            continue
        if not words or not words[0].startswith("-"):
            found.append(
                f"cluster.slurm.extra_sbatch_args: got {option!r}; expected an option of sbatch, such as "
                "--exclude=node7"
            )
    if slurm.host_suffix and not re.fullmatch(r"[\w.-]+", slurm.host_suffix):
        found.append(
            f"cluster.slurm.host_suffix: got {slurm.host_suffix!r}; expected the end of a host's name, such as -ib"
        )
    return [*found, *(_time_problems(slurm) if submits else ())]


def option_words(option: str) -> list[str]:
    """An entry of `extra_sbatch_args` as sbatch's options, each in one word: `--mail-type END` is --mail-type=END."""
    if re.match(r"--[\w-]+=[^'\"\\]*$", option):
        return [option]  # its value may have spaces
    found: list[str] = []
    for word in shlex.split(option):
        if found and not word.startswith("-") and "=" not in found[-1]:
            found[-1] += f"={word}" if found[-1].startswith("--") else word
        else:
            found.append(word)
    return found


def _unprintable(slurm: Slurm) -> Iterator[str]:
    """Line breaks and control characters: each would begin a line of its own in the batch script."""
    for name, value in vars(slurm).items():
        texts = {"": value} if isinstance(value, str) else {}
        if isinstance(value, tuple):
            texts = {f"[{number}]": text for number, text in enumerate(value)}
        elif isinstance(value, dict):
            texts = {f".{key}": text for key, text in value.items()}
        for where, text in texts.items():
            if not f"{where}{text}".isprintable():
                yield (
                    f"cluster.slurm.{name}{where.encode('unicode_escape').decode()}: got a line break or another "
                    "control character; expected one line of text. Fix: write it on one line"
                )


def _environment_problems(slurm: Slurm) -> Iterator[str]:
    for name in (*slurm.environment, *slurm.pass_environment):
        if not re.fullmatch(NAME, name):
            yield (
                f"cluster.slurm.environment: got the name {name!r}; expected letters, digits and _, the first no digit"
            )
    for name, value in slurm.environment.items():
        if is_secret(name, value):
            yield (
                f"cluster.slurm.environment.{name}: got a secret, which everyone who sees the runs folder could read "
                f"in step.json and job.slurm; expected none. Fix: cluster.slurm.pass_environment=[{name}] takes it "
                "from the shell that submits"
            )
        elif COMMAND.search(value):
            yield (
                f"cluster.slurm.environment.{name}: got {value!r}; expected text in which only $NAME is filled in. "
                f"Fix: cluster.slurm.setup: ['export {name}=…'], which the job's shell runs"
            )
    for line in slurm.setup:
        for name, value in ASSIGNED.findall(line):
            if is_secret(name, value):
                yield (
                    f"cluster.slurm.setup: got a secret, the value of {name}; expected none. "
                    f"Fix: cluster.slurm.pass_environment=[{name}] takes it from the shell that submits"
                )


def _time_problems(slurm: Slurm) -> Iterator[str]:
    """A step that is asked to save before it has begun."""
    limits = {stage: minutes(time) * 60 for stage, time in vars(slurm.time).items()}
    if isinstance(slurm.signal_before_limit, int):
        limits = dict([min(limits.items(), key=lambda item: item[1])])
    for stage, limit in limits.items():
        seconds, one = slurm.save_seconds(stage), isinstance(slurm.signal_before_limit, int)
        if seconds >= limit:
            where = "" if one else f".{stage}"
            yield (
                f"cluster.slurm.signal_before_limit{where}: got {seconds} seconds; expected less than the {limit} of "
                f"cluster.slurm.time.{stage}. Fix: cluster.slurm.signal_before_limit{where}={max(1, limit // 4)}"
                + (", or one number a stage, such as cluster.slurm.signal_before_limit={grpo: 1200}" if one else "")
            )
