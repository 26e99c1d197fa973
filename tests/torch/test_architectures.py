"""Adding a model family is what docs/architecture.md says: one entry serves dims, LoRA, memory, smoke test and GGUF."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from pipeline.config.architectures import ARCHITECTURES

# other meanings: llama.cpp's names of a split of text and of a kind of tokenizer, and what it seeks in a model's name;
# TRL's name of a template
OTHER_MEANINGS = {
    ("pipeline/models/gguf.py", "qwen2"),
    ("pipeline/models/gguf.py", "llama"),
    ("pipeline/models/gguf.py", "phi3"),
    ("pipeline/config/model_files.py", "qwen3"),
}
USE = """
import json, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from test_memory import LORA, dims_of, empty, kept
from pipeline import preprocess
from pipeline.config.model_files import model_config
from pipeline.config.recipe import read
from pipeline.models.gguf import read_tokenizer, write_gguf
from pipeline.preflight.checks import problems
from pipeline.sizing.model_sizes import activation_bytes_per_token, adapter_parameters
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime

out = Path(sys.argv[1])
recipe, wrong = read("mistral7b")
assert recipe is not None, wrong
config = model_config(recipe.model)
found = {"parameters": dims_of(config).parameters}
small = {**config, "num_hidden_layers": 2}
model = empty(small, lora=LORA, checkpointing=False)
found["adapters"] = adapter_parameters(dims_of(small), LORA)
found["peft"] = sum(weights.numel() for name, weights in model.named_parameters() if "lora_" in name)
large = {**config, "num_hidden_layers": 4}
growth = [
    kept(large, tokens, lora=None, checkpointing=False) - kept(small, tokens, lora=None, checkpointing=False)
    for tokens in (64, 128)
]
found["kept"] = (growth[1] - growth[0]) / 64 / 2
found["counted"] = activation_bytes_per_token(dims_of(small), None, repeated=False)[0]
found["problems"] = problems(make_plan(["mistral7b"], ["lora.targets=[c_attn]"], cluster="2x2080ti", runs=out))[0]

plan = make_plan(["mistral7b"], smoke_test=True, runs=out)
step = plan.steps[0]
step.folder.mkdir(parents=True)
progress = ProgressFile(None, "preprocess")
preprocess.run(step.recipe, {}, step.folder, Runtime(plan.cluster, progress, 0, 1, step.folder, None, None))
folder = step.folder / "model"
found["small"] = json.loads((folder / "config.json").read_text())["model_type"]
(out / "gguf").mkdir()
write_gguf(folder, out / "gguf" / "x.gguf", "f16", "small")
source = AutoModelForCausalLM.from_pretrained(folder)
packed = AutoModelForCausalLM.from_pretrained(out / "gguf", gguf_file="x.gguf", dtype=torch.float32)
ids = torch.tensor([read_tokenizer(out / "gguf" / "x.gguf")("A correlates with B.")["input_ids"]])
found["off"] = float((source(ids).logits - packed(ids).logits).abs().max())
(out / "found.json").write_text(json.dumps(found))
"""


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Add a model family") :]
    return re.findall(rf"```{kind}\n(.*?)```", section[: section.index("\n## ", 3)], re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project with the entry, the recipe and the sizes of the page."""
    place = tmp_path / "project"
    for folder in ("pipeline", "configs", "deepspeed"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    registry = place / "pipeline" / "config" / "architectures.py"
    text = registry.read_text(encoding="utf-8")
    end = text.index("\n}\n", text.index("ARCHITECTURES: dict")) + 1
    (entry,), (recipe,), (sizes,) = blocks("python"), blocks("yaml"), blocks("json")
    registry.write_text(text[:end] + entry + text[end:], encoding="utf-8")
    (place / "configs" / "mistral7b.yaml").write_text(recipe, encoding="utf-8")
    name = "mistralai--Mistral-7B-Instruct-v0.3.json"
    (place / "configs" / "models" / name).write_text(sizes, encoding="utf-8")
    return place


def run(place: Path, *words: str) -> str:
    path = os.pathsep.join(
        map(str, (place, ROOT / "tests" / "support", ROOT / "tests" / "torch", ROOT / "tests" / "train"))
    )
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_one_entry_serves_everything(copy: Path, tmp_path: Path) -> None:
    table = run(copy, "-m", "pipeline", "plan", "mistral7b", "--cluster", "2x2080ti", "--memory")
    assert "mistral7b/sft: " in table
    assert "weights, nf4" in table
    run(copy, "-c", USE, str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parameters"] == 7_248_023_552  # published
    assert found["adapters"] == found["peft"]
    assert found["kept"] == pytest.approx(found["counted"], rel=0.001)
    problems = found["problems"]
    assert any("lora.targets: got 'c_attn'" in text and "q_proj" in text for text in problems), problems
    assert found["small"] == "mistral"
    assert found["off"] < 0.02


def test_no_other_module_names_a_model_type() -> None:
    named = {
        (str(file.relative_to(ROOT)), kind)
        for file in (ROOT / "pipeline").rglob("*.py")
        for kind in ARCHITECTURES
        if re.search(rf"""["']{kind}["']""", file.read_text(encoding="utf-8"))
    }
    assert named - {("pipeline/config/architectures.py", kind) for kind in ARCHITECTURES} == OTHER_MEANINGS
