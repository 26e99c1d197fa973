"""Quote text of a model or a file inside a Markdown page: shown verbatim, never interpreted.

fenced("```\\n<script>")      a code block whose fence is longer than any in the text
"""

from __future__ import annotations

import re

from pipeline.core.errors import printable


def fenced(text: str, language: str = "") -> str:
    """Return a code block. Its text is not interpreted as Markdown or HTML, and no run of backticks ends it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text).rstrip(chr(10))}\n{fence}"


def cell(text: object) -> str:
    """Return text as one line of a table or list: line ends become blanks; links, tags and borders are escaped."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(" ".join(str(text).split())))
