"""errors: what is printed cannot steer a terminal."""

from __future__ import annotations

import subprocess
import sys

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
