"""errors: what is printed cannot steer a terminal; how every command begins and ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import printable


def test_escape_sequences_are_shown_and_have_no_effect() -> None:
    assert printable("\x1b[31mred\x1b]0;title\x07\r\n\tok") == "␛[31mred␛]0;title␇␍\n\tok"
    assert printable("\x9b31m \x7f \u202eevil\u202c \ud800") == "\ufffd31m \ufffd \ufffdevil\ufffd \ufffd"
    assert printable("naïve → 你好 😀") == "naïve → 你好 😀"


@given(st.text(), st.text())
def test_a_text_can_be_shown_piece_by_piece(one: str, other: str) -> None:
    assert printable(one + other) == printable(one) + printable(other)
    assert len(printable(one)) == len(one)


def test_an_error_that_quotes_a_file_is_printed_without_its_escapes() -> None:
    code = "from pipeline.core.errors import *; run_main(lambda: (_ for _ in ()).throw(PlanError('x\\x1b[2Jy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: x␛[2Jy\n")


def test_a_command_collects_no_garbage_while_it_is_imported_and_does_afterwards() -> None:
    main = "from pipeline.core import errors; errors.run_main(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0))"
    for argument, imported in (("-m", False), ("-c", True)):
        code = f"import gc, sys; sys.argv[0] = {argument!r}; import pipeline; print(gc.isenabled()); {main}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == [str(imported), "True", "True"], done.stderr


def test_every_module_that_is_a_command_begins_with_run_main() -> None:
    marker = 'if __name__ == "__main__":'
    commands = {p: block for p in Path("pipeline").rglob("*.py") if (block := p.read_text().partition(marker)[2])}
    assert len(commands) > 10
    for path, block in commands.items():
        through_harness = re.search(r"main\(\"\w+\", run\)", block) or path.name == "__main__.py"
        assert through_harness or "run_main(" in block, path
