"""The house plan: imports go down only, heavy packages stay on their floors, the light commands stay light."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import MOVED
from pipeline.core import schema

ROOT = Path(__file__).parents[2]


def layers() -> list[str]:
    """The folders from the bottom up, and `*.py` for the stages, as the table in pipeline/__init__.py lists them."""
    table = ast.get_docstring(ast.parse((ROOT / "pipeline" / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.findall(r"^    (\w+(?=/)|\*\.py)", table, re.MULTILINE)[::-1]


LAYERS = layers()
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "bitsandbytes", "pandas"}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[Path]:
    return [
        path
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        if path.parent != ROOT / "pipeline" or not path.name.startswith("__")
    ]


def layer(parts: tuple[str, ...]) -> int:
    """The layer of a module, by its path below pipeline/ without the ending."""
    return LAYERS.index(parts[0] if len(parts) > 1 or parts[0] in LAYERS else "*.py")


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(LAYERS) - {"*.py"}
    stages = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__", "__main__"}
    assert stages == {"preprocess", "sft", "grpo", "evaluate", "report", "export", "ask"}


def test_imports_go_down_only() -> None:
    climbing = []
    for path in modules():
        mine = path.relative_to(ROOT / "pipeline").with_suffix("").parts
        for name in imports_of(path):
            parts = tuple(name.split(".")[1:])
            if name.split(".")[0] == "pipeline" and parts and parts[0] not in ("__version__", "former_names"):
                beside = len(mine) > 1 and parts[0] == mine[0]  # a folder's modules know each other, stages do not
                if layer(parts) >= layer(mine) and not beside:
                    climbing.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not climbing


def test_heavy_packages_stay_in_their_layers() -> None:
    found = {}
    for path in modules():
        parts = path.relative_to(ROOT / "pipeline").with_suffix("").parts
        if LAYERS[layer(parts)] not in ("models", "engines", "training", "*.py"):
            # rows.py imports datasets where it reads the hub's, which no light command does: see LIGHT
            allowed = {"datasets"} if parts == ("tasks", "rows") else set()
            found[path.name] = {name.split(".")[0] for name in imports_of(path)} & (HEAVY - allowed)
    assert not {name: heavy for name, heavy in found.items() if heavy}


def test_a_task_that_imports_a_module_by_its_former_name_keeps_working() -> None:
    code = "from pipeline import answers\nfrom pipeline.rows import lacks\nfrom pipeline.typed import Positive\n"
    code += "from pipeline.tasks.task import Task, Verdict\nfrom pipeline.tasks.corr2cause.text import premise\n"
    code += "class Old(Task):\n    def asked(self, question): return 'mine'\n"
    code += "assert Old.example_from_text is Old.asked\n"
    code += "import pipeline.scoring.answers\nprint(answers is pipeline.scoring.answers)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    for old, new in (
        ("pipeline.rows", "pipeline.tasks.rows"),
        ("pipeline.tasks.rows.lacks", "missing_fields"),
        ("pipeline.tasks.task.Verdict", "Grade"),
        ("pipeline.tasks.corr2cause.text", "pipeline.tasks.corr2cause.wording"),
        ("Old.asked", "example_from_text"),
    ):
        assert f"FutureWarning: {old} is now {new}" in done.stderr
    assert "FutureWarning: pipeline.core.schema.Positive is now PositiveInt" in done.stderr
    assert all(hasattr(schema, name) for name in schema.FORMER.values())
    assert all(importlib.util.find_spec(name) for name in MOVED.values())


def test_the_report_imports_nothing_heavy() -> None:
    """It runs once a chain, and importing torch would cost it more than its own work."""
    code = "import sys, pipeline.report; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & HEAVY


@pytest.mark.slow
def test_an_evaluation_imports_no_trainer_and_no_peft() -> None:
    """PEFT imports bitsandbytes and with it a compiler: a quarter of the time, for nothing without an adapter."""
    code = "import sys, pipeline.evaluate; print(sorted(name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(ast.literal_eval(done.stdout)) & {
        *("pipeline.training.trainer", "trl", "datasets", "transformers.trainer", "peft", "bitsandbytes")
    }


@pytest.mark.slow
def test_a_stage_imports_what_it_uses() -> None:
    """SFT has neither GRPO's trainer nor an engine, and DeepSpeed only in a layout that names it."""
    unused = {
        "pipeline.sft": ("trl.trainer.grpo_trainer", "pipeline.engines", "pipeline.rewards.audit", "deepspeed", "vllm"),
        "pipeline.grpo": ("trl.trainer.sft_trainer", "pipeline.engines.vllm", "deepspeed", "vllm"),
        "pipeline.preprocess": ("torch", "transformers", "datasets", "pandas"),
        "pipeline.training.distributed": ("transformers", "trl", "datasets", "deepspeed"),
    }
    for module, names in unused.items():
        code = f"import sys, {module}; print(sorted(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert not set(ast.literal_eval(done.stdout)) & set(names), module


LIGHT = [
    ["--help"],
    ["plan", "tiny"],
    ["plan", "deepseek7b", "--cluster", "a100", "--memory"],
    ["check", "tiny", "--audit"],
    ["plan", "medical", "--smoke-test"],
    ["list"],
    ["status"],
    ["run", "tiny", "--launcher", "slurm", "--dry-run"],
]


@pytest.mark.parametrize("argv", LIGHT, ids=lambda argv: " ".join(argv))
def test_light_commands_import_nothing_heavy(argv: list[str], tmp_path: Path) -> None:
    argv = argv if argv[0] in ("--help", "list") else [*argv, "--runs", str(tmp_path)]
    code = (
        "import sys, json, io, contextlib\n"
        "from pipeline.cli.main import command\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    command({argv!r})\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = set(json.loads(done.stdout))
    assert not found & (HEAVY | {"numpy", "pyarrow", "jinja2"})
    if "tiny" in argv or argv in (["--help"], ["list"], ["status"]):  # a model that is not on the hub
        assert not found & {"huggingface_hub", "httpx", "asyncio"}


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
