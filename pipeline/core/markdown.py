"""Text of a model or a file inside a Markdown page: shown as it is, and never a part of the page.

fenced("```\\n<script>")      a code block whose fence is longer than any in the text
"""

from __future__ import annotations

import re

from pipeline.core.errors import printable


def fenced(text: str, language: str = "") -> str:
    """A code block. Nothing in it is Markdown or HTML, and no run of backticks in it ends it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text).rstrip(chr(10))}\n{fence}"


def cell(text: object) -> str:
    """One line of a table or a list: line ends are blanks, and no character of it is a link, a tag or a border."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(" ".join(str(text).split())))
