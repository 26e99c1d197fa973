"""What the package never does: run a shell with a user's words, unpickle what may be downloaded, run remote code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_slurm import plan_of
from running import NANO, ROOT, run_cli

from pipeline.launchers.slurm import run_plan

FILES = sorted((ROOT / "pipeline").rglob("*.py"))
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec")
UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
# reads the shards of a checkpoint whose signed manifest was verified (checkpoints.checkpoint_to_resume)
SIGNED_ONLY = "pipeline/training/conversion.py"
# of objects that are made of a config, which is JSON, and of adapters, whose files weight_checks reads before
NO_FOREIGN_CODE = ("PeftConfig.from_pretrained", "PeftModel.from_pretrained")
LOADERS = ("from_pretrained", "from_config")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_no_pickle_no_remote_code(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert not imported & set(UNPICKLERS)
    for name, call in calls(path):
        where = f"{place}:{call.lineno}: {name}"
        assert name not in SHELLS, where
        assert keyword(call, "shell") in (None, "False"), where
        assert keyword(call, "trust_remote_code") in (None, "False"), where
        assert keyword(call, "allow_pickle") in (None, "False"), where
        if name == "torch.load" and place != SIGNED_ONLY:
            assert keyword(call, "weights_only") == "True", where
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            raise AssertionError(where)
        if name.startswith("Auto") and name.endswith(LOADERS):
            spread = {ast.unparse(word.value) for word in call.keywords if word.arg is None}
            assert spread & {"NO_CODE", "NO_PICKLE"}, where


def test_the_rules_are_looked_at() -> None:
    """Each rule meets a call in the package that it is about."""
    names = [name for path in FILES for name, _ in calls(path)]
    assert names.count("torch.load") >= 2
    assert sum(name.startswith("Auto") and name.endswith(LOADERS) for name in names) >= 8
    assert sum(name.startswith("subprocess.") for name in names) >= 8


# ---------------------------------------------------------------- secrets

PLANTED = {
    name: f"{prefix}planted{number}{'x' * 24}"
    for number, (name, prefix) in enumerate(
        {
            "HF_TOKEN": "hf_",
            "HUGGING_FACE_HUB_TOKEN": "hf_",
            "WANDB_API_KEY": "",
            "OPENAI_API_KEY": "sk-",
            "THEREFORE_API_KEY": "sk-",
            "THEREFORE_PASSWORD": "",
            "AWS_SECRET_ACCESS_KEY": "",
            "GITHUB_TOKEN": "ghp_",
        }.items()
    )
}


def check_nothing_planted(runs: Path, least: int) -> None:
    files = [path for path in runs.rglob("*") if path.is_file()]
    assert len(files) >= least
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in PLANTED.items() if value.encode() in content], path


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["sft.max_length=1"]], ids=["done", "failed"])
def test_no_file_of_a_run_holds_a_secret_of_the_environment(tmp_path: Path, more: list[str]) -> None:
    """Logs, progress, spec, artifact, checkpoints, TensorBoard's events: also where the step fails."""
    words = ["run", "tiny", *NANO, *more, "cluster.processes=1", "sft.max_steps=2", "--stages", "preprocess,sft"]
    done = run_cli(*words, "--runs", str(tmp_path), env=PLANTED)
    assert (done.returncode == 0) == (not more), done.stderr
    assert not [name for name, value in PLANTED.items() if value in done.stdout + done.stderr]
    check_nothing_planted(tmp_path, 10 if more else 25)
    events = [path.name for path in tmp_path.glob("tiny/sft-*/tensorboard/**/*tfevents*")]
    assert more or events


def test_a_submitted_chain_holds_the_names_of_secrets_only(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    run_plan(plan_of(tmp_path, f"cluster.slurm.pass_environment=[{','.join(PLANTED)}]"))
    check_nothing_planted(tmp_path / "runs", 21)
    script = next((tmp_path / "runs").glob("tiny/sft-*/job.slurm")).read_text()
    assert "HF_TOKEN" in script
