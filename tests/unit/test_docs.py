"""The pages of documentation: links lead somewhere, commands can be typed, the scripts are named."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from running import ROOT

from pipeline.cli.main import parser
from pipeline.config.recipe import recipe_names

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python -m pipeline|therefore|bash (?P<script>run_pipeline\.sh)) (?P<words>.*)")


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page in a link."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_typed(page: Path) -> None:
    """As far as the command and its options go; what stands in brackets is left out."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for found in filter(None, map(COMMAND.match, block.splitlines())):
            words = shlex.split(re.sub(r" \[[^]]*\]| < \S+", "", found["words"]), comments=True)
            _, rest = parser().parse_known_args(["run", *words] if found["script"] else words)
            assert not [word for word in rest if word.startswith("-")], found[0]


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_contributing_says_what_each_script_does() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted((ROOT / "scripts").iterdir()) if f"| `scripts/{path.name}" not in text] == []


def test_every_recipe_is_described() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in recipe_names() if f"`{name}`" not in text] == []
