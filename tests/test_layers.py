"""The house plan: imports go down only, heavy packages stay on their floors, the light commands stay light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(("errors", "typed", "fingerprint", "files", "loading", "libraries", "markdown", "records"), 0),
    **dict.fromkeys(
        (
            *("recipe", "cluster", "slurm", "artifact", "progress", "runtime", "families", "slurm_words", "jobs"),
            *("nvidia", "site"),
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "tasks",
            "rows",
            "row_files",
            "rewards",
            "answers",
            "verdicts",
            "quantities",
            "arithmetic",
            "units",
            "expressions",
            "reading",
            "metrics",
            "charts",
            "rehearsal",
            "memory",
            "model_sizes",
            "host_memory",
            "fitting",
            "task_code",
        ),
        2,
    ),
    **dict.fromkeys(("modeling", "weight_checks", "template_trial", "to_gguf", "generation", "kernels"), 3),
    **dict.fromkeys(("faults", "layouts", "signing", "step_folders"), 1),
    **dict.fromkeys(("devices", "operators"), 3),
    **dict.fromkeys(("distributed", "checkpoints", "monitor", "pace", "training"), 3),
    "stage": 4,
    **dict.fromkeys(("preprocess", "sft", "grpo", "evaluate", "report", "export", "ask"), 5),
    **dict.fromkeys(("plan", "status", "fetch", "push"), 6),
    **dict.fromkeys(("preflight", "refresh"), 7),
    "launchers": 8,
    "__main__": 9,
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes", "pandas"}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return [path for path in sorted((ROOT / "pipeline").rglob("*.py")) if path != ROOT / "pipeline" / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def test_imports_go_down_only() -> None:
    climbing = []
    for path in modules():
        here = FLOORS[room(path)]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in FLOORS:
                there = FLOORS[parts[1]]
                beside = there == here and here < 5  # stages, launchers and the command line do not know their like
                if there >= here and parts[1] != room(path) and not beside:
                    climbing.append(f"{path.relative_to(ROOT)} ({here}) imports pipeline.{parts[1]} ({there})")
    assert not climbing


def test_heavy_packages_stay_on_their_floors() -> None:
    found = {}
    for path in modules():
        if FLOORS[room(path)] not in (3, 5):
            # rows.py imports datasets where it reads the hub's, which no light command does: see LIGHT
            allowed = {"datasets"} if room(path) == "rows" else set()
            found[path.name] = {name.split(".")[0] for name in imports_of(path)} & (HEAVY - allowed)
    assert not {name: heavy for name, heavy in found.items() if heavy}


def test_the_report_imports_nothing_heavy() -> None:
    """It runs once a chain, and importing torch would cost it more than its own work."""
    code = "import sys, pipeline.report; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & HEAVY


def test_an_evaluation_imports_no_trainer() -> None:
    code = "import sys, pipeline.evaluate; print(sorted(name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & {"pipeline.training", "trl", "datasets", "transformers.trainer"}


LIGHT = [
    ["--help"],
    ["plan", "tiny"],
    ["plan", "deepseek7b", "--cluster", "a100", "--memory"],
    ["check", "tiny", "--audit"],
    ["plan", "medical", "--rehearse"],
    ["list"],
    ["status"],
    ["run", "tiny", "--launcher", "slurm", "--dry-run"],
]


@pytest.mark.parametrize("argv", LIGHT, ids=lambda argv: " ".join(argv))
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, json, io, contextlib\n"
        "from pipeline.__main__ import command\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    command({argv!r})\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & (HEAVY | {"numpy", "pyarrow", "jinja2"})


def test_the_folder_deepspeed_holds_json_only() -> None:
    """An __init__.py in it would hide the package; a wheel with it would write into the package."""
    assert {path.suffix for path in (ROOT / "deepspeed").iterdir()} == {".json"}
    assert 'include = ["pipeline*"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_scripts_are_one_verb_of_fifteen_lines() -> None:
    for script in (ROOT / "scripts").iterdir():
        if script.is_file():
            assert len(script.read_text(encoding="utf-8").splitlines()) <= 15, script.name


def test_every_module_says_what_it_is_for() -> None:
    for path in (ROOT / "pipeline").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stat().st_size:
            assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
