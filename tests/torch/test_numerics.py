"""Training numerics and what decides them: seeds, devices, kernels, skipped steps, idle GRPO, resumed callbacks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipes import cluster_of, recipe_of
from running import NANO
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import sdpa_attention
from trl.kernels import chunked_logprob
from trl.trainer import utils

from pipeline import preprocess, sft
from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Lora, Model, RandomInit, read
from pipeline.core.errors import LaunchError, Stopped
from pipeline.models import kernels
from pipeline.models.loading import INT8_LOGGER, add_lora, load_model, make_random_model, repeat_keys_before_ampere
from pipeline.training.callbacks import (
    IDLE_STEPS_WARNING,
    MAX_SKIPPED_IN_A_ROW,
    LearningSignalCallback,
    ProgressCallback,
)
from pipeline.training.saves import CheckpointCallback
from pipeline.training.trainer import LEAST_BUCKET, deepspeed_settings, load_for_training, raise_if_training_failed
from pipeline.workflow.artifact import STOP, Artifact
from pipeline.workflow.plan import make_plan
from pipeline.workflow.progress import ProgressFile, read_progress
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.weights import Checkpoint, find_checkpoint

SCRATCH = RandomInit("qwen2", 400, 32, 1, 4, 2, 32, 128, 10000.0, 0.02)
MODEL = Model("m", None, SCRATCH, None, None, "none", "sdpa", "float32")
LORA = Lora(True, 4, 8.0, 0.0, ("q_proj",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch")
    make_random_model(
        SCRATCH, ["Premise: A correlates with B.\nHypothesis: A directly causes B."] * 50, "think", out, 0
    )
    return out


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A trained adapter on the model of `folder`."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    base = load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    add_lora(base, LORA, keep_dtype=False).save_pretrained(out)
    return Checkpoint(str(folder), out, str(folder))


def runtime_of(folder: Path, **changes: Any) -> Runtime:
    cluster, problems = read_cluster("local", [f"{name}={value}" for name, value in changes.items()])
    assert cluster is not None, problems
    return Runtime(cluster, ProgressFile(folder, "grpo"), 0, 1, folder, None, None)


# ---------------------------------------------------------------- what is loaded, where, in which precision


def test_the_seed_alone_decides_a_fresh_adapter(folder: Path) -> None:
    """Whatever was drawn before: other processes and reruns get the same."""
    recipe, _ = read("qwen1.5b", ["seed=3", "model.quantization=none", "model.dtype=float32"])
    cluster, _ = read_cluster("local", ["sft.deepspeed=none"])
    assert recipe is not None
    assert cluster is not None
    drawn = []
    for before, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(before)
        model = load_for_training(replace(recipe, seed=seed), find_checkpoint(str(folder)), cluster.sft)
        drawn.append({name: w.detach().clone() for name, w in model.named_parameters() if "lora_A" in name})
    same, other = ([torch.equal(drawn[0][name], d[name]) for name in drawn[0]] for d in drawn[1:])
    assert all(same)
    assert same
    assert not any(other)


def test_an_adapter_is_read_on_the_cpu_by_every_rank(adapter: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own choice is the first GPU. There is none here, so a read that goes there fails."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    monkeypatch.setattr("peft.utils.save_and_load.infer_device", lambda: "cuda")
    recipe, _ = read("qwen1.5b", ["model.quantization=none", "model.dtype=float32"])
    cluster, _ = read_cluster("local", ["grpo.deepspeed=none"])
    assert recipe is not None
    assert cluster is not None
    model = load_for_training(recipe, adapter, cluster.grpo)
    model.load_adapter(str(adapter.adapter), "default", is_trainable=True)  # as the trainer does when it resumes
    assert {weights.device.type for weights in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(("layout", "dtype"), [("zero3", torch.float16), ("zero2", torch.float32)])
def test_an_adapter_that_is_trained_on_has_the_precision_of_a_fresh_one(
    adapter: Checkpoint, folder: Path, layout: str, dtype: torch.dtype
) -> None:
    """ZeRO-3 takes its own precision from the weights it trains: from float32 ones float16 would not be scaled."""
    recipe, _ = read("qwen1.5b", ["model.quantization=none", "model.dtype=float16"])
    cluster, _ = read_cluster("local", [f"grpo.deepspeed={layout}"])
    assert recipe is not None
    assert cluster is not None
    for checkpoint in (adapter, find_checkpoint(str(folder))):
        model = load_for_training(recipe, checkpoint, cluster.grpo)
        assert {weights.dtype for weights in model.parameters() if weights.requires_grad} == {dtype}


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize(
    ("gpu", "asks"), [(None, True), ((7, 5), False), ((7, 0), False), ((8, 0), True), ((9, 0), True)]
)
def test_below_capability_8_keys_are_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, asks: bool
) -> None:
    """SDPA's `enable_gqa` keeps every score there; what attention gives is the same."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    model = load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    real, asked = torch.nn.functional.scaled_dot_product_attention, []

    def attention(*args: Any, **settings: Any) -> Any:
        asked.append(settings.get("enable_gqa", False))
        return real(*args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    with monkeypatch.context() as patched:
        if gpu:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            patched.setattr(torch.cuda, "get_device_capability", lambda: gpu)
        repeat_keys_before_ampere()
    asked.clear()
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)
    assert asked == [asks]


def test_a_model_is_loaded_with_keys_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr("pipeline.models.loading.compute_capability", lambda: 7.5)
    load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    assert not sdpa_attention.use_gqa_in_sdpa(None, torch.empty(1, 2, 8, 16), torch.empty(1, 2, 8, 16))


def test_int8_does_not_report_its_input_at_every_matmul(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INT8_LOGGER, "filters", [])
    model = load_model(find_checkpoint(str(folder)), replace(MODEL, quantization="int8"), dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, INT8_LOGGER.name):
        model(input_ids=torch.arange(5)[None])
        INT8_LOGGER.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == INT8_LOGGER.name] == ["something else"]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU with Triton, as `choose_head` sees it, and a folder for temporary files."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


def test_triton_is_used_where_a_compiler_works(on_cuda: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.choose_head()
    assert chunked_logprob._TRITON_AVAILABLE
    assert capsys.readouterr().out == ""
    place = Path(os.environ["TRITON_CACHE_DIR"])
    assert place == on_cuda / f"therefore-triton-{os.getuid()}"
    assert place.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no compiler", "Triton cannot compile on this node: no C compiler (gcc or clang on PATH, or CC); torch"),
        ("missing", "the C compiler /nowhere/cc cannot be run"),
        ("broken", "Triton cannot compile on this node: false fails (no message); torch computes the head"),
        ("no headers", "Triton cannot compile on this node: no Python.h in /nowhere; torch computes the head instead"),
    ],
)
def test_without_a_compiler_or_headers_torch_computes_the_head(
    on_cuda: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str, sentence: str
) -> None:
    if case == "no compiler":
        monkeypatch.setenv("PATH", str(on_cuda))
    elif case == "no headers":
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    else:
        monkeypatch.setenv("CC", {"missing": "/nowhere/cc", "broken": "false"}[case])
    kernels.choose_head()
    assert not chunked_logprob._TRITON_AVAILABLE
    (line,) = capsys.readouterr().out.splitlines()
    assert sentence in line
    assert "Fix: load a compiler module" in line


def test_the_head_scores_what_has_a_label_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, TRL would score prompts and padding too."""
    kernels.choose_head()
    model = load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    utils.add_fused_lm_head(model)
    scored = []

    class Spy(chunked_logprob.ChunkedLogProbFunction):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, *words: Any) -> Any:
            scored.append(len(hidden))
            return chunked_logprob.ChunkedLogProbFunction.forward(ctx, hidden, *words)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 8, 9], [-100, -100, 7, -100, -100]])
    found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert scored == [3]
    assert (found != 0).sum() == 3


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("tiny", "auto", LEAST_BUCKET),
        ("deepseek7b", "auto", "auto"),  # the square of its width is more
        ("tiny", 1000, 1000),
        ("tiny", None, None),  # a file of the user's that does not name it
    ],
)
def test_a_small_models_gradients_are_summed_together(
    name: str, given: object, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = {"stage": 2} if given is None else {"stage": 2, "reduce_bucket_size": given}
    monkeypatch.setattr("pipeline.training.trainer.read_deepspeed", lambda _: {"zero_optimization": zero})
    recipe = recipe_of(name)
    settings = deepspeed_settings(recipe.model, recipe.grpo.optimizer, cluster_of("local").grpo)
    assert settings is not None
    assert settings["zero_optimization"].get("reduce_bucket_size") == found


def test_a_cache_that_belongs_to_someone_else_is_not_used(on_cuda: Path) -> None:
    """Compiled code is loaded from it."""
    taken = on_cuda / f"therefore-triton-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    open_to_all = kernels.private_folder("therefore-triton")
    taken.rmdir()
    taken.symlink_to("/nowhere")
    link = kernels.private_folder("therefore-triton")
    assert taken not in (open_to_all, link)
    assert open_to_all.is_dir()
    assert link.is_dir()


# ---------------------------------------------------------------- skipped steps


class Steps:
    """A trainer's steps as its callbacks see them: each skipped or taken, and what is logged of it."""

    def __init__(self, folder: Path, *, fp16: bool = True, **cluster: Any) -> None:
        self.args = TrainingArguments(output_dir=str(folder), fp16=fp16, use_cpu=True)
        self.state, self.control, self.skipped = TrainerState(max_steps=1000, log_history=[]), TrainerControl(), False
        accelerator = type("A", (), {"optimizer_step_was_skipped": property(lambda _: self.skipped)})()
        handler = SimpleNamespace(callbacks=[])
        self.trainer: Any = SimpleNamespace(
            accelerator=accelerator, callback_handler=handler, args=self.args, state=self.state
        )
        runtime = runtime_of(folder, **cluster)
        self.watch, self.signal = ProgressCallback(runtime, self.trainer), LearningSignalCallback(runtime)

    def step(self, found: Mapping[str, float] | None = None, *, skipped: bool = False) -> dict[str, Any]:
        self.skipped, logs = skipped, {"loss": 1.0, "grad_norm": 0.5, **(found or {})}
        self.state.global_step += 1
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.watch.on_step_end(self.args, self.state, self.control)
        for callback in (self.watch, self.signal):
            callback.on_log(self.args, self.state, self.control, logs=logs)
        return dict(self.state.log_history[-1])


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("norm", [INF, NAN])
def test_under_fp16_an_infinite_norm_with_a_finite_loss_is_a_skipped_step(tmp_path: Path, norm: float) -> None:
    steps = Steps(tmp_path)
    assert steps.step({"grad_norm": norm}, skipped=True) == {
        "loss": 1.0,
        "grad_norm": None,
        "step": 1,
        "skipped_steps": 1,
    }
    assert steps.step()["skipped_steps"] == 1
    assert steps.watch.broken is None
    assert not steps.control.should_training_stop
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.figures["skipped"] == 1


@pytest.mark.parametrize(
    ("fp16", "skipped", "logs", "reason"),
    [
        (True, True, {"loss": NAN, "grad_norm": INF}, "loss is nan at step 1"),
        (True, False, {"grad_norm": NAN}, "grad_norm is nan at step 1"),  # the step was taken
        (False, True, {"grad_norm": INF}, "grad_norm is inf at step 1"),  # nothing is scaled in bfloat16
        (False, False, {"loss": INF}, "loss is inf at step 1"),
    ],
)
def test_anything_else_that_is_not_finite_ends_the_run(
    tmp_path: Path, fp16: bool, skipped: bool, logs: dict[str, float], reason: str
) -> None:
    steps = Steps(tmp_path, fp16=fp16)
    steps.control.should_save = True
    steps.step(logs, skipped=skipped)
    assert steps.watch.broken == reason
    assert steps.control.should_training_stop
    assert not steps.control.should_save  # a rerun would resume from it
    with pytest.raises(LaunchError, match=f"training diverged: {reason}"):
        raise_if_training_failed(steps.trainer, steps.watch, steps.signal, stopped=False, out=tmp_path)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        steps.step({"grad_norm": INF}, skipped=True)
    steps.step()
    for number in range(MAX_SKIPPED_IN_A_ROW):
        assert steps.watch.broken is None, number
        steps.step({"grad_norm": INF}, skipped=True)
    assert steps.watch.broken == f"the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row overflowed float16"


# ---------------------------------------------------------------- GRPO that learns nothing


FLAT = {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.5}
CUT = {"frac_reward_zero_std": 0.5, "completions/clipped_ratio": 1.0}
GOOD = {"frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.5}


@pytest.mark.parametrize(
    ("logs", "while_it_runs", "at_the_end", "counts"),
    [
        (FLAT, "no group has rewards that differ", "in 12 of 12 steps no group of completions had rewards", (12, 0)),
        (
            CUT,
            "every completion is cut at its longest",
            "in 12 of 12 steps every completion was cut at",
            (0, 12),
        ),
    ],
)
def test_grpo_without_a_signal_is_reported_where_the_user_looks(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    logs: dict[str, float],
    while_it_runs: str,
    at_the_end: str,
    counts: tuple[int, int],
) -> None:
    steps = Steps(tmp_path, fp16=False)
    for _ in range(12):
        steps.step(logs)
    assert (
        f"warning: {while_it_runs}, {IDLE_STEPS_WARNING} steps in a row up to step {IDLE_STEPS_WARNING}"
        in capsys.readouterr().out
    )
    steps.watch.progress.update(force=True)
    progress = read_progress(tmp_path)
    assert progress is not None
    assert progress.note == while_it_runs
    assert steps.signal.broken is None  # cluster.max_idle_steps is null
    steps.signal.warn()
    progress = read_progress(tmp_path)
    assert progress is not None
    assert [text.startswith(at_the_end) for text in progress.warnings] == [True]
    assert tuple(steps.signal.metrics().values()) == counts


def test_grpo_that_learns_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(tmp_path, fp16=False, max_idle_steps=3)
    for logs in (FLAT, FLAT, GOOD, CUT, GOOD, FLAT, GOOD):
        steps.step(logs)
    steps.signal.warn()
    assert "warning" not in capsys.readouterr().out
    assert steps.signal.broken is None
    assert steps.signal.metrics() == {"steps_without_spread": 3, "steps_all_cut": 1}


def test_the_cluster_may_end_grpo_that_learns_nothing(tmp_path: Path) -> None:
    steps = Steps(tmp_path, fp16=False, max_idle_steps=3)
    for logs in (GOOD, FLAT, CUT):
        steps.step(logs)
    assert not steps.control.should_training_stop
    steps.step(FLAT)
    assert steps.control.should_training_stop
    reason = "GRPO had nothing to learn: no group has rewards that differ, 3 steps in a row up to step 4"
    with pytest.raises(LaunchError, match=reason):
        raise_if_training_failed(steps.trainer, steps.watch, steps.signal, stopped=False, out=tmp_path)


# ---------------------------------------------------------------- early stopping over a restart

PATIENT = [
    "task.params.validation_classes=0.3",
    "task.params.validation_rows=8",
    "sft.eval_steps=2",
    "sft.early_stopping_patience=2",
    "sft.max_steps=20",
    "sft.optimizer.name=adamw_torch",
    "sft.optimizer.warmup=0",
    "sft.optimizer.learning_rate=5",  # breaks the model: the validation loss is best at once
    "sft.full_loss_fraction=0",
    "cluster.sft.deepspeed=none",
    "cluster.processes=1",
    "cluster.save_steps=3",
    "cluster.keep_checkpoints=20",
    "cluster.loggers=[]",
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads than free cores make a small model many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stop:
    """Asks for a stop when a step is reached, as `cancel` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, step: int) -> None:
        real = CheckpointCallback.on_step_end

        def on_step_end(callback: CheckpointCallback, args: Any, state: TrainerState, control: Any, **more: Any) -> Any:
            if state.global_step == step:
                (folder / STOP).touch()
            return real(callback, args, state, control, **more)

        monkeypatch.setattr(CheckpointCallback, "on_step_end", on_step_end)


@pytest.mark.filterwarnings("ignore")  # the libraries', in the process of the test
def test_early_stopping_keeps_its_patience_and_its_saves_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    plan = make_plan(["tiny"], [*NANO, *PATIENT], runs=tmp_path)
    recipe, cluster = plan.steps[0].recipe, plan.cluster

    def run(stage: Any, folder: Path, inputs: dict[str, Artifact]) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        runtime = Runtime(cluster, ProgressFile(folder, "sft"), 0, 1, folder, None, None)
        return dict(stage.run(recipe, inputs, folder, runtime))

    data = Artifact("preprocess", "preprocess", "tiny", "", {}, {}, {}, {}, {}, tmp_path / "data")
    run(preprocess, data.folder, {})
    environment = {name: value for name, value in os.environ.items() if name.startswith(("WANDB", "TRACKIO"))}
    whole = run(sft, tmp_path / "whole", {"data": data})
    best, end = whole["validation_step"], whole["steps"]
    assert end == best + 4 < 20
    assert environment == {  # else the next step of this process would be logged as the same run
        name: value for name, value in os.environ.items() if name.startswith(("WANDB", "TRACKIO"))
    }
    saved = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "whole/checkpoints").glob("checkpoint-*")}
    assert saved == {step for step in range(1, end + 1) if step % 2 == 0 or step % 3 == 0}

    # stopped after the first validation without a better loss, and again after the one that ends it
    parts = tmp_path / "parts"
    for step in (best + 3, end):
        with monkeypatch.context() as patched:
            Stop(patched, parts, step)
            with pytest.raises(Stopped):
                run(sft, parts, {"data": data})
    resumed = run(sft, parts, {"data": data})
    names = ("steps", "validation_loss", "validation_step", "validations")
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert resumed["resumed_from"] == f"checkpoint-{end}"
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
