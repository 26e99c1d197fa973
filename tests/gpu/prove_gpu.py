"""Prove the GPU paths on one GPU, in at most ten minutes, with nothing downloaded.

    scripts/prove-gpu                       every section, in the order of its value
    scripts/prove-gpu kernels seven         these sections
    scripts/prove-gpu --cpu                 small shapes on a CPU: every check that does not need a GPU

Each section runs in a process of its own under a time limit, so a crash or a hang costs one section. Prints a Markdown
table (what, expected, got) and writes it with results.json and a log of each section to --out.
Exit codes: 0 all checks passed, 1 a check failed or could not run, 2 misuse. docs/gpu.md explains the sections.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from proof import Check, Finding, Measured, Place, Section, one_process

from pipeline.core.errors import EXIT_FAILURE, PlanError, did_you_mean, run_main
from pipeline.core.files import read_lines, write_json
from pipeline.training.harness import git_commit, versions
from pipeline.workflow import faults

TOTAL = 590  # seconds of the whole proof
LEAST = 10  # seconds that a section needs to be started at all
SLOWER = 6  # on a CPU limits are longer by this factor
WIRES = "wires"  # in the names of the sections that try every way to train
STATES = {True: "passed", False: "failed", None: "measured"}
MARKS = {"passed": "passed", "failed": "**FAILED**", "measured": "measured", "skipped": "skipped"}


def main() -> None:
    run_main(lambda: command(sys.argv[1:]))


def command(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    sections = chosen(importlib.import_module(args.checks).SECTIONS, args)
    if args.list:
        for name, section in sections.items():
            print(f"{name:<14} {section.limit:>4} s  {section.about}")
        return 0
    if args.results:  # the process of one section
        (name,) = args.sections
        measure(name, sections[name], Place(args.work, not args.cpu), args.results)
        return 0
    if not args.cpu:
        require_gpu()
    return prove(sections, args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="scripts/prove-gpu",
        description="Prove the GPU paths on one GPU, in at most ten minutes, with nothing downloaded.",
    )
    top.add_argument("sections", nargs="*", metavar="SECTION", help="only these (default: all; see --list)")
    top.add_argument("--cpu", action="store_true", help="small shapes on a CPU: every check that does not need a GPU")
    top.add_argument("--list", action="store_true", help="the sections with their time limits")
    top.add_argument("--out", type=Path, default=Path("runs/prove-gpu"), metavar="DIR", help="table, JSON and logs")
    top.add_argument("--work", type=Path, metavar="DIR", help="scratch space for 16 GB of weights (default: $TMPDIR)")
    top.add_argument("--ways", metavar="A,B", help="only these ways of the sections wires-…, such as 'nf4,full'")
    top.add_argument("--checks", default="gpu_checks", metavar="MODULE", help="a module with SECTIONS of your own")
    top.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    return top


def chosen(sections: dict[str, Section], args: argparse.Namespace) -> dict[str, Section]:
    """The sections and ways that the words name. PlanError for every name that is not known."""
    unknown = [
        f"section: got {name!r}; {did_you_mean(name, sections)}" for name in args.sections if name not in sections
    ]
    wanted = [way for way in (args.ways or "").split(",") if way]
    ways = {
        one.what.rpartition(", ")[2] for name, section in sections.items() for one in section.checks if WIRES in name
    }
    unknown += [f"--ways: got {way!r}; {did_you_mean(way, ways)}" for way in wanted if way not in ways]
    if unknown:
        raise PlanError(*unknown)
    found = {}
    for name, section in sections.items():
        if not args.sections or name in args.sections:
            kept = [one for one in section.checks if not wanted or one.what.rpartition(", ")[2] in wanted]
            found[name] = replace(section, checks=tuple(kept)) if WIRES in name else section
    return found


def require_gpu() -> None:
    """PlanError where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise PlanError(
            f"GPU: got none (torch {torch.__version__} sees no CUDA device); expected one NVIDIA GPU. "
            "Fix: run this on a node with a GPU, or scripts/prove-gpu --cpu for the checks that need none"
        )


# ---------------------------------------------------------------- the process of one section


def measure(name: str, section: Section, place: Place, results: Path) -> None:
    """Run a section's checks one after the other; each leaves one line of JSON in `results` when it ends."""
    faults.die_with_parent()  # a proof that is killed leaves no process on the GPU
    os.environ |= one_process()
    for one in section.checks:
        if one.needs_gpu and not place.gpu:
            finding = Finding(name, one.what, one.expected, "not run: needs a GPU", "skipped")
        else:
            began = time.time()
            found = _measured(one, place)
            took = round(time.time() - began, 1)
            finding = Finding(name, one.what, one.expected, found.got, STATES[found.passed], took, found.facts)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finding), default=str) + "\n")
        print(f"{finding.state}: {one.what}: {finding.got}", flush=True)


def _measured(one: Check, place: Place) -> Measured:
    """What a check found; an exception is a finding too."""
    try:
        return one.measure(place)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        where = traceback.format_exc(limit=-3)
        return Measured(f"{type(error).__name__}: {first[:200]}", False, {"traceback": where})


# ---------------------------------------------------------------- the whole proof


def prove(sections: dict[str, Section], args: argparse.Namespace) -> int:
    """Run each section in a process of its own, print the table, write it and the JSON. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a section's process ends too
    began = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="prove-gpu-", dir=args.work))
    findings: list[Finding] = []
    try:
        for name, section in sections.items():
            left = TOTAL * (SLOWER if args.cpu else 1) - (time.time() - began)
            print(f"{name}: {section.about}", file=sys.stderr, flush=True)
            for finding in run_section(name, section, args, work, left):
                findings.append(finding)
                print(f"  {finding.state:<8} {finding.what}: {finding.got}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failed = [finding for finding in findings if finding.state == "failed"]
    where = device(args.cpu)
    record = {
        "passed": not failed,
        "device": where,
        "seconds": round(time.time() - began, 1),
        "git": git_commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "findings": [asdict(finding) for finding in findings],
    }
    write_json(args.out / "results.json", record)
    text = table(where, findings)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    count = sum(finding.state == "passed" for finding in findings)
    print(f"{count} passed, {len(failed)} failed, {record['seconds']:.0f} s; {args.out}/results.json and table.md")
    return EXIT_FAILURE if failed else 0


def run_section(name: str, section: Section, args: argparse.Namespace, work: Path, left: float) -> Iterator[Finding]:
    """The findings of one section; a check that its process did not reach is a failed one."""
    limit = section.limit * (SLOWER if args.cpu else 1)
    if left < LEAST:
        for one in section.checks:
            yield Finding(name, one.what, one.expected, f"not run: the proof's {TOTAL} s were over", "failed")
        return
    results, log = args.out / f"{name}.jsonl", args.out / f"{name}.log"
    results.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--results", str(results), "--work", str(work)]
    command += [
        "--checks",
        args.checks,
        *(["--cpu"] if args.cpu else []),
        *(["--ways", args.ways] if args.ways else []),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(cpu=args.cpu),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(min(limit, left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = {record["what"]: Finding(**record) for record in read_lines(results)} if results.is_file() else {}
    results.unlink(missing_ok=True)
    ended = (
        f"its process ended with code {code}" if code is not None else f"not finished after {min(limit, left):.0f} s"
    )
    for one in section.checks:
        yield found.get(one.what) or Finding(name, one.what, one.expected, f"{ended}; see {log}", "failed")


def environment(*, cpu: bool) -> dict[str, str]:
    """One GPU, or none, whatever the machine has."""
    # as the launchers do: another ninja than the environment's compiles DeepSpeed's operator again, for minutes
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {"PATH": path, "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {faults.PARENT: str(os.getpid()), "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    if cpu:
        settings |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
        settings |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    else:
        settings |= {"CUDA_VISIBLE_DEVICES": visible.split(",")[0], "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return {**os.environ, **settings}


def device(cpu: bool) -> str:
    """The card's name, memory and compute capability."""
    if cpu:
        return "CPU (small shapes): no GPU path was run"
    import torch

    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}"


def table(where: str, findings: Sequence[Finding]) -> str:
    """The findings as Markdown."""
    lines = [f"Device: {where}", "", "| section | what | expected | got | result |", "|---|---|---|---|---|"]
    for one in findings:
        cells = [one.section, one.what, one.expected, one.got]
        lines.append(f"| {' | '.join(_cell(text) for text in cells)} | {MARKS[one.state]} |")
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
