"""status, logs, cancel: steps that run, wait or have run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pipeline.core.errors import (
    EXIT_INTERRUPTED,
    PlanError,
    printable,
)
from pipeline.workflow import status
from pipeline.workflow.time_spent import TIME_NOTE, table


def status_command(args: argparse.Namespace) -> int:
    ask = status.ThrottledQuery()  # the table again and again, Slurm at most every 30 s

    def read() -> tuple[list[status.Row], list[str]]:
        return status.table(args.runs, args.recipes, everything=args.all, ask=ask)

    rows, troubles = read()
    if args.json:
        print(json.dumps([status.as_record(row) for row in rows], indent=1))
    elif not rows and troubles:
        raise PlanError(*troubles)
    elif not rows:
        print(f"nothing has run under {args.runs}/; begin with python -m pipeline run tiny")
    elif args.watch:
        for text in status.watch(read):
            print(text, flush=True)
        rows, _ = read()
    else:
        print(status.show(rows, troubles))
    if args.time and not args.json and (spent := table({row.step: row.seconds_by_part for row in rows})):
        print(f"\nseconds {TIME_NOTE}\n{spent}")
    reports = [row for row in rows if row.state == "done" and row.stage == "report"]
    if not args.json and reports and not any(row.live for row in rows):
        print("\n" + "\n".join(f"report: {row.folder}/report.html" for row in reports))
    return 0


def logs_command(args: argparse.Namespace) -> int:
    ask = status.ThrottledQuery()
    rows, troubles = status.table(args.runs, ask=ask)
    try:
        row = status.find_step(rows, args.step)
    except PlanError as error:
        raise PlanError(*error.problems, *troubles) from None  # it may lie where nothing could be listed

    def going() -> bool:
        now, _ = status.table(args.runs, [Path(row.folder).parent.name], ask=ask)
        return any(other.live for other in now if other.folder == row.folder)

    print(printable(f"{row.step}: {row.state}; {row.log}"), file=sys.stderr)
    for text in status.follow(Path(row.log), going if args.follow else None):
        print(text, end="", flush=True)
    return 0


def cancel_command(args: argparse.Namespace) -> int:
    rows, troubles = status.table(args.runs)
    recipes = {row.recipe for row in rows}
    chosen = [row for row in rows if not args.names or row.recipe in args.names]
    chosen += [status.find_step(rows, name) for name in args.names if name not in recipes]
    going = {row.step: row for row in chosen if row.live}
    if troubles and (not rows or any(row.state == "unknown" for row in chosen)):
        raise PlanError(*troubles)
    if not going:
        print("nothing is under way; nothing to cancel")
        return 0
    print(status.show(list(going.values())))
    if not args.yes:
        if not sys.stdin.isatty():
            raise PlanError(f"{len(going)} steps would be ended; say --yes")
        if input(f"end these {len(going)} steps? what is done stays [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was ended")
            return EXIT_INTERRUPTED
    print("\n".join(status.cancel(going.values())))
    return 0
