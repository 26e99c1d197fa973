"""Try an unknown chat template in a separate process with limits on time and memory.

    python -m pipeline.models.template_trial < {"template": …, "special": {…}}     writes {"length": …} or {"error": …}

A template is a program: nested loops or `10**10**10` never end, and signals do not interrupt them in C code. A template
that renders a few short chats within the limits is accepted. The templates of this project and of TRL need no trial.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtifactError, run_main

CPU_SECONDS = 2  # of CPU time, for all the chats below
MEMORY_BYTES = 1 << 30  # in addition to the libraries' memory
MAX_CHARACTERS = 1_000_000  # of one short chat
CHATS = [
    [{"role": "user", "content": "Is 2 + 2 = 4?"}],
    [{"role": "user", "content": "Is 2 + 2 = 4?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\nYes"}],
    [
        {"role": "user", "content": "Is 2 + 2 = 4?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "And 5?"},
    ],
]


def try_template(template: str, special: dict[str, Any], where: str) -> None:
    """Raise ArtifactError if the template fails, does not end, or writes far too much text.

    `special` are the special tokens that a template may name; `where` is the template's file, for the message.
    """
    trial = json.dumps({"template": template, "special": {key: str(value) for key, value in special.items()}})
    command = [sys.executable, "-m", "pipeline.models.template_trial"]
    try:
        done = subprocess.run(command, input=trial, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{where}: the trial of the chat template did not end within 300 s, so the machine is overloaded. "
            "Fix: rerun the command"
        ) from None
    if done.returncode == -signal.SIGXCPU:
        problem = f"does not end within {CPU_SECONDS} s on a chat of three turns"
    elif done.returncode:
        problem = (
            f"ends its process with code {done.returncode} (it needs more than {MEMORY_BYTES >> 20} MiB, or crashes)"
        )
    else:
        found = json.loads(done.stdout.splitlines()[-1])
        problem = found.get("error", "")
        if not problem and found["length"] > MAX_CHARACTERS:
            problem = f"writes {found['length']:,} characters for a chat of three turns"
    if problem:
        raise ArtifactError(
            f"{where}: the chat template {problem}. Fix: set model.chat_template, as configs/base.yaml describes it"
        )


def main() -> None:
    """Render every chat with the template on stdin; print the greatest length, or the first error, as JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    trial = json.load(sys.stdin)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    longest = 0
    try:
        for prompt in (True, False):
            rendered, _ = render_jinja_template(
                CHATS, chat_template=trial["template"], add_generation_prompt=prompt, **trial["special"]
            )
            longest = max(longest, *map(len, rendered))
        found: dict[str, Any] = {"length": longest}
    except Exception as error:  # any exception is an error of the template
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"fails ({type(error).__name__}: {lines[0][:300]})"}
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
