"""Export a checkpoint: the adapter alone, merged in 16 bit, merged and then quantized to 4 bit, or one GGUF file.

    python -m pipeline export --ckpt runs/tiny/grpo-… --format merged16
    python -m pipeline export --ckpt runs/tiny/grpo-… --format gguf --quant q4_0 --push OWNER/NAME

An adapter is merged into the base model's 16-bit weights, whatever it was trained on, never into 4-bit ones; merged4
is that model, quantized afterwards. Leaves `model/`, `adapter/` or `gguf/` with tokenizer, chat template, generation
config and a model card: the files that are pushed. The artifact's identity names what was merged into what.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from pipeline import __version__
from pipeline.config.model_files import FORMATS
from pipeline.config.recipe import Evaluate, Recipe
from pipeline.core import stopwatch
from pipeline.core.markdown import cell, fenced
from pipeline.engines.text import stop_ids
from pipeline.models.gguf import write_gguf
from pipeline.models.loading import (
    check_adapter_alone,
    check_tokenizer,
    choose_dtype,
    input_device,
    load_tokenizer,
    merge_adapter,
    nf4_config,
    revision_of,
)
from pipeline.models.weight_checks import NO_CODE, NO_PICKLE, check_computes, loading_errors
from pipeline.scoring.metrics import MAIN_METRICS
from pipeline.tasks.task import Task, task_of
from pipeline.training.harness import git_commit, main, versions
from pipeline.workflow.artifact import Artifact, is_done, open_artifact, step_of
from pipeline.workflow.figures import recorded_metrics
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.stage import ROLES, STAGES, Export
from pipeline.workflow.weights import ADAPTER, Checkpoint, find_checkpoint

SMOKE_TEST_NOTICE = "SMOKE TEST of a shrunken model with random weights: nothing here is a result."


def run(recipe: Recipe, inputs: Mapping[str, Artifact], out: Path, runtime: Runtime) -> dict[str, Any]:
    options = runtime.options
    assert isinstance(options, Export)
    kind, quant = options.format, options.quant or ""
    checkpoint = find_checkpoint(options.checkpoint)
    place = out / {"adapter": "adapter", "gguf": "gguf"}.get(kind, "model")
    shutil.rmtree(place, ignore_errors=True)  # of an attempt that did not end
    place.mkdir(parents=True)
    stopwatch.enter("load")
    runtime.progress.update(state="running", total=2, unit="files", note="loading the tokenizer")
    tokenizer = load_tokenizer(checkpoint, recipe.model)

    # ---- weights
    metrics: dict[str, Any] = {"format": kind}
    if kind == "adapter":
        assert checkpoint.adapter is not None  # the plan has looked
        check_adapter_alone(checkpoint, recipe.model)
        for name in (ADAPTER, "adapter_model.safetensors", "adapter_model.bin"):
            if (checkpoint.adapter / name).is_file():
                shutil.copy(checkpoint.adapter / name, place)
        stops = [tokenizer.eos_token_id]
    else:
        runtime.progress.update(note="merging in 16 bit" if checkpoint.adapter else "loading the model")
        model = merge_adapter(checkpoint, recipe.model, merge_dtype(recipe, checkpoint))
        check_tokenizer(tokenizer, model, checkpoint)
        check_computes(model, str(checkpoint.adapter or checkpoint.base), input_device(model))
        stops = stop_ids(model, tokenizer)
        metrics["parameters"] = int(model.num_parameters())
        stopwatch.enter("save")
        whole = place if kind == "merged16" else out / ".merged16"
        model.save_pretrained(whole)
        metrics["dtype"] = str(model.dtype).removeprefix("torch.")
        del model
        runtime.progress.update(done=1, note=f"writing {quant or kind}")
        try:
            if kind == "merged4":
                quantize_nf4(whole).save_pretrained(place)
            if kind == "gguf":
                tokenizer.save_pretrained(whole)
                file = place / f"{recipe.name}-{quant}.gguf"

                def report_progress(note: str) -> None:
                    runtime.progress.update(note=note)

                write_gguf(whole, file, quant, f"{recipe.name} {options.source}", report_progress)
        finally:
            if whole != place:
                shutil.rmtree(whole, ignore_errors=True)

    # ---- what goes with them
    if kind != "gguf":
        tokenizer.save_pretrained(place)
        generation_config(tokenizer, stops, recipe.evaluate).save_pretrained(place)
    (place / "README.md").write_text(card(recipe, checkpoint, place, options, tokenizer), encoding="utf-8")
    metrics["bytes"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    runtime.progress.update(done=2, note="")
    return metrics


def merge_dtype(recipe: Recipe, checkpoint: Checkpoint) -> torch.dtype:
    """The precision of a merged model: the recipe's where that has 16 bit, else the base model's own, else bfloat16."""
    wanted = choose_dtype(recipe.model)
    if wanted != torch.float32:
        return wanted
    with loading_errors(f"model {checkpoint.base}"):
        revision = revision_of(checkpoint, recipe.model)
        own = AutoConfig.from_pretrained(checkpoint.base, revision=revision, **NO_CODE).dtype
    return own if own in (torch.bfloat16, torch.float16) else torch.bfloat16


def quantize_nf4(folder: Path) -> Any:
    """A model folder of 16 bit in bitsandbytes' nf4, as its own serialization has it."""
    dtype = AutoConfig.from_pretrained(folder, **NO_CODE).dtype
    quantization = nf4_config(dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization, **NO_PICKLE)


def generation_config(tokenizer: PreTrainedTokenizerBase, stops: list[int], settings: Evaluate) -> GenerationConfig:
    """How the model was evaluated: what stops it, and how its tokens are drawn."""
    drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=settings.max_new_tokens,
        **(drawn if settings.temperature else {"do_sample": False}),
    )


# ---------------------------------------------------------------- the card


def card(
    recipe: Recipe,
    checkpoint: Checkpoint,
    place: Path,
    options: Export,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The model card: what it is, its task and data, its figures, what it was made of, how to use it."""
    task = task_of(recipe.task, recipe.seed)
    source = Path(options.checkpoint)
    line = lineage(source)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fenced": fenced, "cell": cell}
    hub = not (recipe.model.random_init or recipe.model.gguf or Path(recipe.model.name).exists())
    return environment.get_template("card.md.jinja").render(
        title=f"{recipe.name}: {task.title}",
        version=__version__,
        kind=options.format,
        about=FORMATS[options.format],
        quant=options.quant or "",
        file=next((path.name for path in place.glob("*.gguf")), ""),
        warning=SMOKE_TEST_NOTICE if recipe.smoke_test else "",
        recipe=recipe,
        hub=hub,
        base=checkpoint.base,
        adapter=checkpoint.adapter is not None,
        trained_in=options.trained_in,
        trained=[artifact for artifact in line if STAGES[artifact.stage].trains],
        rows=next((artifact.metrics.get("rows", {}) for artifact in line if artifact.stage == "preprocess"), {}),
        task=task,
        settings=recipe.task.params,
        evaluations=[(role, recorded_metrics(artifact)) for role, artifact in evaluations(line)],
        headline=MAIN_METRICS,
        line=line,
        source=f"{line[-1].recipe}/{line[-1].step}-{line[-1].fingerprint}" if line else source.name,
        commit=git_commit() or "unknown",
        versions=versions(),
        prompt=example_prompt(tokenizer, task),
    )


def lineage(source: Path) -> list[Artifact]:
    """The finished steps that a checkpoint was made by, the first one first."""
    found: dict[str, Artifact] = {}

    def visit(folder: Path) -> None:
        made = step_of(folder)
        if made is None or str(made[0]) in found or not is_done(made[0]):
            return
        artifact = open_artifact(made[0], verify=False)
        for other in map(Path, artifact.inputs.values()):
            beside = made[0].parent / other.name  # a runs folder may have been moved
            visit(beside if beside.is_dir() else other)
        found[str(made[0])] = artifact

    visit(source)
    return list(found.values())


def evaluations(line: list[Artifact]) -> list[tuple[str, Artifact]]:
    """The evaluations of these steps that lie beside them: of the base model, then of each trained one."""
    found: list[tuple[str, Artifact]] = []
    prints = {artifact.fingerprint for artifact in line}
    beside = sorted({artifact.folder.parent for artifact in line})
    for folder in (path for place in beside for path in sorted(place.glob("evaluate-*"))):
        if is_done(folder):
            artifact = open_artifact(folder, verify=False)
            inputs = artifact.payload["inputs"]
            if artifact.role in ROLES and set(inputs.values()) <= prints:
                found.append((artifact.role, artifact))
    return sorted(found, key=lambda pair: ROLES.index(pair[0]))


def example_prompt(tokenizer: PreTrainedTokenizerBase, task: Task) -> str:
    """The prompt that the model gets, in its chat format."""
    messages = task.messages(task.example_from_text("…"))
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


if __name__ == "__main__":
    main("export", run)
