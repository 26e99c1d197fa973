"""Load a checkpoint into the engine that the cluster's settings name, for an evaluation and for chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config.cluster import EvaluationEngine, MaxMemory
from pipeline.config.recipe import Model
from pipeline.engines.engine import Engine
from pipeline.engines.text import stop_ids
from pipeline.engines.transformers import TransformersEngine
from pipeline.models.loading import check_tokenizer, choose_dtype, load_for_chat, load_skeleton, revision_of
from pipeline.models.weight_checks import check_adapter_fits
from pipeline.workflow.weights import Checkpoint


@dataclass(frozen=True)
class Loaded:
    """An engine with a checkpoint in it."""

    engine: Engine
    stops: list[int]
    context: int  # tokens that it reads


def load_engine(
    checkpoint: Checkpoint,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationEngine,
    *,
    rows: int,
    length: int,
    limits: MaxMemory | None = None,
    eager: bool = False,
) -> Loaded:
    """Load a checkpoint, its adapter unmerged, to compute `rows` samples at once of at most `length` tokens.

    `eager` starts vLLM without compiling. Raises DataError if a prompt of that length leaves vLLM no room to answer.
    """
    if settings.engine == "vllm":
        return _load_vllm(checkpoint, model, tokenizer, settings, rows, length, eager)
    loaded = load_for_chat(checkpoint, model, limits)
    check_tokenizer(tokenizer, loaded, checkpoint)
    return Loaded(TransformersEngine(loaded, tokenizer, rows), stop_ids(loaded, tokenizer), context_of(loaded))


def _load_vllm(
    checkpoint: Checkpoint,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationEngine,
    rows: int,
    length: int,
    eager: bool,
) -> Loaded:
    from pipeline.engines.vllm import ROWS, VllmEngine, VllmSettings, adapter_rank

    skeleton = load_skeleton(checkpoint, model)
    check_tokenizer(tokenizer, skeleton, checkpoint)
    if checkpoint.adapter:
        check_adapter_fits(skeleton, checkpoint.adapter)
    context, stops = context_of(skeleton), stop_ids(skeleton, tokenizer)
    engine = VllmEngine(
        checkpoint.base,
        tokenizer,
        stops,
        VllmSettings(
            dtype=choose_dtype(model),
            rows=max(rows, ROWS) if torch.cuda.is_available() else rows,
            max_length=min(length, context),
            quantization=model.quantization,
            revision=revision_of(checkpoint, model),
            lora_rank=adapter_rank(checkpoint.adapter) if checkpoint.adapter else None,
            gpu_memory=settings.gpu_memory,
            tensor_parallel=settings.tensor_parallel if settings.tensor_parallel != "auto" else 1,
            eager=eager,
        ),
    )
    if checkpoint.adapter:
        engine.load_adapter(checkpoint.adapter)
    return Loaded(engine, stops, engine.limit)


def context_of(model: Any) -> int:
    """Return how many tokens a model reads."""
    return int(model.config.get_text_config().max_position_embeddings)
