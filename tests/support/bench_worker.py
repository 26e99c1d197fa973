"""One process of a training run that is measured: `torchrun … bench_worker.py --way W --step DIR --out DIR`.

The ways are those of plain_training.py, `ours` (the stage's own code, from its step.json), and `machine`, which trains
nothing: it measures the processor's matmul rate in the shapes of the model's layers, and counts what a row costs.

The meter is the same for all. It counts from the end of the warm-up to the end of the last step, so that neither the
start nor the last save is in it. Each process writes `OUT/RANK.json`; the driver (bench_training.py) reads them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from pipeline.core import stopwatch
from pipeline.training import distributed
from pipeline.training.harness import run_spec
from pipeline.workflow import faults
from pipeline.workflow.stage import read_spec

MEASURED_SECONDS = 0.3  # of matrix products, for each shape of layer
PROFILED_STEPS = 5  # after the warm-up; each has thousands of operators
COPIED_BYTES = 1 << 28
TOP = 25  # operators of a profile that are printed
GROUPS = {  # of a profile, by the names of operators
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "communication": ("c10d::", "gloo:", "nccl:"),
    "optimizer": ("Optimizer.step", "aten::_foreach", "aten::_fused_adam"),
}


class Meter(TrainerCallback):  # type: ignore[misc]
    """Counts the steps, seconds and tokens of a trainer after its warm-up."""

    def __init__(self, trainer: Trainer, warmup: int, profile: bool) -> None:
        self.trainer, self.warmup = trainer, warmup
        self.counts: Counter[str] = Counter()
        self.first: tuple[float, int, Counter[str]] | None = None
        self.last: tuple[float, int, Counter[str]] | None = None
        self.generating = False
        self.profiled = 0.0  # seconds
        self.profiler = torch.profiler.profile() if profile and os.environ.get("RANK", "0") == "0" else None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any) -> None:
        model.register_forward_pre_hook(self.count_tokens, with_kwargs=True)

    def count_tokens(self, model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Count the tokens of a micro-batch that are of a row, and all that are computed."""
        ids, mask = named.get("input_ids", inputs[0] if inputs else None), named.get("attention_mask")
        if self.generating or ids is None:
            return
        self.counts["places"] += ids.numel()
        if mask is not None and mask.shape != ids.shape:  # it says who attends to whom; nothing is padded
            mask = None
        self.counts["tokens"] += ids.numel() if mask is None else int(mask.sum())

    def timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Return GRPO's generation, with its seconds and tokens counted."""

        @functools.wraps(generate)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began, self.generating = time.perf_counter(), True
            found = generate(*args, **kwargs)
            self.generating = False
            self.counts["generation_ms"] += round(1000 * (time.perf_counter() - began))
            self.counts["prompt_tokens"] += sum(map(len, found[0]))
            self.counts["completions"] += len(found[1])
            self.counts["completion_tokens"] += sum(map(len, found[1]))
            return found

        return wrapped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.last = (time.perf_counter(), state.global_step, self.counts.copy())
        if state.global_step == self.warmup:
            self.first = self.last
            if self.profiler:
                self.profiler.start()
        last_of_profile = min(self.warmup + PROFILED_STEPS, state.max_steps)
        if self.profiler and self.first and not self.profiled and state.global_step == last_of_profile:
            self.profiler.stop()
            self.profiled = self.last[0] - self.first[0]

    def result(self) -> dict[str, Any]:
        if self.first is None or self.last is None or self.last[1] == self.first[1]:
            raise SystemExit(f"bench: training ended within its warm-up of {self.warmup} steps. Fix: raise --steps")
        history = self.trainer.state.log_history
        flat = [entry["frac_reward_zero_std"] for entry in history if "frac_reward_zero_std" in entry]
        return {
            "seconds": self.last[0] - self.first[0],
            "steps": self.last[1] - self.first[1],
            **(self.last[2] - self.first[2]),
            "memory_gb": peak_memory(),
            "flat_groups": sum(flat) / len(flat) if flat else None,
            "loss": next((entry["train_loss"] for entry in reversed(history) if "train_loss" in entry), None),
        }


def peak_memory() -> float:
    """Return the most memory that this process has held, in GB: of its GPU, else of its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def measure(warmup: int, profile: bool, out: Path) -> None:
    """Have every trainer of this process measured."""
    train = Trainer.train

    def measured(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        meter = Meter(self, warmup, profile)
        self.add_callback(meter)
        if hasattr(self, "_generate"):
            self._generate = meter.timed(self._generate)
        found = train(self, *args, **kwargs)
        result = meter.result()
        if meter.profiler:
            result["profile"] = summary(meter.profiler, meter.profiled)
        write(out, result)
        return found

    Trainer.train = measured


def summary(profiler: torch.profiler.profile, seconds: float) -> dict[str, Any]:
    """Return where the seconds of rank 0 went: by kind of operator, and the operators that took most."""
    events = profiler.key_averages()
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        kind = next((k for k, names in GROUPS.items() if any(name in event.key for name in names)), "other operators")
        spent[kind] += event.self_cpu_time_total / 1e6
    spent["outside of operators (Python, waiting)"] = max(0.0, seconds - sum(spent.values()))
    table = events.table(sort_by="self_cpu_time_total", row_limit=TOP)
    return {"seconds": dict(sorted(spent.items(), key=lambda kind: -kind[1])), "table": table}


# ---------------------------------------------------------------- the machine, and what a row costs


def machine(folder: Path) -> dict[str, Any]:
    """Return the matmul rate of this process for the model's layers, and the operations that a run's rows need.

    Operations: a multiplication and an addition count as two. The body of the model costs 6 for each weight and token
    (2 forward, 4 backward; frozen weights 4), its head 6 where a label is, attention 6 × d for each pair of a token
    and one before it, in each layer.
    """
    from plain_training import load, lora, read_job, sft_rows

    job = read_job(folder)
    model, trained = load(job), 6
    if job.recipe.lora.enabled and not job.checkpoint.adapter:
        from peft import get_peft_model

        model, trained = get_peft_model(model, lora(job)), 4
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    frozen = sum(m.weight.numel() for m in layers if not m.weight.requires_grad)
    learned = sum(m.weight.numel() for m in layers if m.weight.requires_grad)
    rows, config = sft_rows(job), model.config
    lengths = [len(row["input_ids"]) for row in rows]
    labels = sum(label != -100 for row in rows for label in row["labels"])
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = (6 * learned + 4 * frozen) * sum(lengths)
    attention = 6 * width * config.num_hidden_layers * sum(length * length for length in lengths)
    at_once = max(lengths)
    shapes = Counter(tuple(m.weight.shape) for m in layers if min(m.weight.shape) > 1)
    muon = job.recipe.sft.optimizer.name == "muon"
    return {
        "rate": matmul_rate(shapes, at_once, job.dtype),
        "bandwidth": bandwidth(),
        "rows": len(rows),
        "tokens": sum(lengths),
        "longest": at_once,
        "labels": labels,
        "operations": body + trained * head.weight.numel() * labels + attention,
        # of each process and step: weights are read three times and written, gradients and moments written and read
        "bytes": 4 * (4 * (learned + frozen + head.weight.numel()) + 6 * (learned + head.weight.numel())),
        "orthogonalized": sum(newton_schulz(min(one), max(one)) * times for one, times in shapes.items())
        if muon
        else 0,
        "weights": sum(weights.numel() for weights in model.parameters()),
        "precision": str(job.dtype).removeprefix("torch."),
        "attention_share": attention / (body + trained * head.weight.numel() * labels + attention),
    }


def newton_schulz(short: int, long: int) -> int:
    """Return the operations in which Muon orthogonalizes one update: 5 iterations of three products."""
    return 5 * (4 * short * short * long + 2 * short**3)


def matmul_rate(shapes: Counter[tuple[int, ...]], tokens: int, dtype: torch.dtype) -> float:
    """Return operations a second of forward and backward products of layers of these shapes, as often as they occur."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operations, seconds = 0.0, 0.0
    for (rows, columns), count in shapes.items():
        weight = torch.randn(rows, columns, dtype=dtype, device=device)
        given = torch.randn(tokens, columns, dtype=dtype, device=device)
        back = torch.randn(tokens, rows, dtype=dtype, device=device)
        products = [lambda a=given, w=weight: a @ w.T, lambda b=back, w=weight: b @ w, lambda b=back, a=given: b.T @ a]
        for product in products:
            operations += 2.0 * tokens * rows * columns * count
            seconds += seconds_of(product) * count
    return operations / seconds


def bandwidth() -> float:
    """Return the bytes a second of copying what is too large for a cache: those read and those written."""
    given = torch.ones(COPIED_BYTES // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    copied = torch.empty_like(given)
    return 2 * COPIED_BYTES / seconds_of(lambda: copied.copy_(given))


def seconds_of(product: Callable[[], Any]) -> float:
    """Return the seconds of one product, repeated until enough of them are measured."""
    product()
    began, times = time.perf_counter(), 0
    while True:
        product()
        times += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if (spent := time.perf_counter() - began) > MEASURED_SECONDS / 3:
            return spent / times


def write(out: Path, result: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result), encoding="utf-8")


def work(way: str, folder: Path, out: Path, warmup: int, profile: bool = False) -> None:
    """Run a step's stage, or a plain script in its place, and write what was measured."""
    if way == "machine":
        write(out, machine(folder))
        return
    measure(warmup, profile, out)
    stage = read_spec(folder).stage
    if way == "ours":
        stopwatch.begin(stopwatch.process_start())
        run_spec(folder, importlib.import_module(f"pipeline.{stage}").run)
        return
    from plain_training import WAYS, read_job

    WAYS[stage][way](read_job(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", required=True)
    parser.add_argument("--step", type=Path, required=True, help="a step's folder, with its step.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warmup", type=int, required=True, help="optimizer steps before measuring begins")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    faults.die_with_parent()
    work(options.way, options.step, options.out, options.warmup, options.profile)
    distributed.finish()


if __name__ == "__main__":
    main()
