"""How a model is loaded, once: tokenizer, chat format, precision, quantization, adapters, checkpoints.

The same code path loads a hub id, a local folder, a step's folder, a Trainer checkpoint and an adapter, for
training and for evaluation. `make_random_model` makes a small model from nothing, so that the whole pipeline runs
where no hub can be reached.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import sdpa_attention
from transformers.utils import is_flash_attn_2_available

from pipeline.config.architectures import ARCHITECTURES
from pipeline.config.cluster import AMPERE, MaxMemory, half_precision
from pipeline.config.model_files import TEMPLATES, gguf_file, special_in
from pipeline.config.recipe import Lora, Model, RandomInit
from pipeline.core.errors import ArtifactError, RecipeError
from pipeline.models.gguf import read_tokenizer
from pipeline.models.template_trial import try_template
from pipeline.models.weight_checks import (
    NO_CODE,
    NO_PICKLE,
    as_list,
    attach_adapter,
    check_adapter_fits,
    check_computes,
    check_finite,
    check_keys,
    check_round_trip,
    check_sizes,
    forget_generation_config,
    loading_errors,
)
from pipeline.scoring.answers import OPEN
from pipeline.workflow.artifact import Artifact
from pipeline.workflow.weights import Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from peft import (
        PeftModel,  # at run time only where there is an adapter: PEFT imports a compiler through bitsandbytes
    )

PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<|endoftext|>",
)
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
ROLE_TOKENS = ["<|user|>", "<|assistant|>", "<|system|>"]
THINK_TAGS = ["<think>", "</think>"]


# ---------------------------------------------------------------- tokenizer and chat format


def load_tokenizer(checkpoint: Checkpoint, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint with the recipe's chat template.

    Its eos token is what ends a turn in that template (Phi-3.5's own is another); pad is another token than eos where
    the vocabulary has one; padding is left. ArtifactError where it cannot read back a sentence or a chat.
    """
    where = checkpoint.tokenizer
    check_sizes(checkpoint.base, revision_of(checkpoint, model))  # the tokenizer's class is in the model's config
    with loading_errors(f"tokenizer {where}"):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision_of(checkpoint, model), **NO_CODE)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    if not tokenizer.chat_template:
        raise RecipeError(
            f"model.chat_template: null, and the tokenizer of {where} has none; "
            f"use one of {', '.join(TEMPLATES)} or the path of a .jinja file"
        )
    with loading_errors(f"tokenizer {where}"):
        template = str(tokenizer.get_chat_template())
        if not _is_known(template):
            try_template(template, tokenizer.special_tokens_map, model.chat_template or f"tokenizer {where}")
        tokenizer.eos_token = end_of_turn(tokenizer)
        if tokenizer.pad_token in (None, tokenizer.eos_token):
            known = tokenizer.get_vocab()
            spare = (pad for pad in PAD_TOKENS if pad in known and pad != tokenizer.eos_token)
            tokenizer.pad_token = next(spare, tokenizer.eos_token)
        tokenizer.padding_side = "left"
        check_round_trip(tokenizer, _chat_text(tokenizer, add_generation_prompt=True), where)
    return tokenizer


def _is_known(template: str) -> bool:
    """Whether a chat template is one of this project or of TRL, which end."""
    return any(path.read_text(encoding="utf-8") == template for path in TEMPLATES.values() if path.is_file())


def _chat_text(tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> str:
    """One question in the tokenizer's chat format."""
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, **arguments))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that follows an assistant's words in the chat template: what a model stops at."""
    words = "Therefore"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if words not in text:
        raise RecipeError("model.chat_template: leaves out what an assistant says; use a template that writes it")
    after = tokenizer(text[text.rindex(words) + len(words) :], add_special_tokens=False)["input_ids"]
    if after and after[0] in tokenizer.added_tokens_decoder:
        return str(tokenizer.convert_ids_to_tokens(after[0]))
    if tokenizer.eos_token is None:
        raise RecipeError(
            "model.chat_template: an assistant's turn ends in no special token, and the tokenizer has no eos token; "
            f"use one of {', '.join(TEMPLATES)} or a template that ends each turn with one"
        )
    return str(tokenizer.eos_token)


def read_template(name: str) -> str:
    """A chat template by name or by path."""
    path = TEMPLATES.get(name, Path(name))
    if not path.is_file():
        raise RecipeError(
            f"model.chat_template: {name!r} is no file and none of {', '.join(TEMPLATES)}; null: the model's own"
        )
    return path.read_text(encoding="utf-8")


def template_opens_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the generation prompt already opens `<think>`, so that a completion begins inside the thought."""
    return _chat_text(tokenizer, add_generation_prompt=True).rstrip().endswith(OPEN)


def prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[int]:
    """Tokens of each conversation with its generation prompt."""
    return [len(ids) for ids in prompt_ids(tokenizer, prompts)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[list[int]]:
    """Token ids of each conversation with its generation prompt: what generation begins from, everywhere."""
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Any], completions: list[Any]
) -> list[dict[str, list[int]]]:
    """Tokens and labels of prompt/completion conversations.

    The loss falls on what the model itself will have to write: the tokens of the assistant's turn that come after
    the generation prompt, its stop token included; -100 elsewhere. What a template writes after the stop token is
    left out: a model is never asked for it.
    Raises RecipeError where the chat format writes a prompt differently in training than for generation.
    """
    before = prompt_ids(tokenizer, prompts)
    whole = [list(prompt) + list(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    texts = tokenizer.apply_chat_template(whole, tokenize=False)
    rows = []
    for start, ids in zip(before, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        if ids[: len(start)] != start:
            raise RecipeError(
                "model.chat_template: the generation prompt is not how a training text begins "
                f"({tokenizer.decode(start)[-60:]!r} against {tokenizer.decode(ids)[:60]!r}…); use a template whose "
                "assistant turn begins as its generation prompt does"
            )
        ids = ids[: _stop(ids, len(start), tokenizer.eos_token_id)]
        rows.append({"input_ids": list(ids), "labels": [-100] * len(start) + list(ids[len(start) :])})
    return rows


def _stop(ids: list[int], start: int, eos: int) -> int:
    """Where a row ends: after the first stop token of its answer."""
    return next((k + 1 for k in range(start, len(ids)) if ids[k] == eos), len(ids))


# ---------------------------------------------------------------- precision


def device() -> torch.device:
    """This process's device: its own GPU (LOCAL_RANK) or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_capability() -> float | None:
    """Of this process's GPU, such as 7.5; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def choose_dtype(model: Model) -> torch.dtype:
    """One precision for training and evaluation: bf16 where the hardware has it, fp16 on older GPUs.

    A GPU's capability is asked, not `is_bf16_supported`, which is true on Turing by emulation.
    RecipeError where the recipe asks for what this GPU has not.
    """
    name, gpu = str(model.dtype), compute_capability()
    if name == "auto" and gpu:
        name = half_precision(gpu)
    elif name == "auto":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        name = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    if gpu and name == "bfloat16" and half_precision(gpu) != name:
        raise RecipeError(f"model.dtype: 'bfloat16', which this GPU (compute capability {gpu:g}) has not; use auto")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_attention(model: Model) -> str:
    """`auto` is FlashAttention where it is installed and the GPU and the precision are made for it, else SDPA."""
    if model.attention != "auto":
        return model.attention
    gpu = compute_capability()
    fast = gpu is not None and gpu >= AMPERE and choose_dtype(model) != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if fast else "sdpa"


def repeat_keys_before_ampere() -> None:
    """Below compute capability 8 have transformers repeat the keys that heads share before it calls SDPA.

    Without a mask it passes `enable_gqa` instead, which on such a GPU only SDPA's math kernel takes: that one keeps the
    whole score matrix in float32 (2 to 3 GiB a layer of a 7B model at 2,500 tokens). On other devices nothing changes.
    """
    gpu = compute_capability()
    if gpu and gpu < AMPERE:
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False


# ---------------------------------------------------------------- weights


def base_checkpoint(model: Model, data: Path) -> Checkpoint:
    """The base model: what preprocess has drawn or unpacked; else the hub id or local folder."""
    if model.random_init or model.gguf:
        return find_checkpoint(str(data / "model"))
    return find_checkpoint(model.name) if Path(model.name).exists() else Checkpoint(model.name, None, model.name)


def initial_checkpoint(model: Model, inputs: Mapping[str, Artifact]) -> Checkpoint:
    """Where training or an evaluation starts: the weights of the step before it, else the base model."""
    if "model" in inputs:
        return find_checkpoint(str(inputs["model"].folder))
    return base_checkpoint(model, inputs["data"].folder)


def load_model(
    checkpoint: Checkpoint,
    model: Model,
    *,
    dtype: torch.dtype,
    train_adapter: bool = False,
    keep_dtype: bool = False,
    spread: dict[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """The model of a checkpoint in the recipe's quantization, its adapter loaded unmerged.

    `train_adapter` leaves the adapter's weights trainable, so that GRPO continues from the SFT adapter; `keep_dtype`
    holds them in the base's precision, as `add_lora` does; `spread` are accelerate's arguments for a model on several
    devices.
    """
    repeat_keys_before_ampere()
    if model.quantization == "int8":
        INT8_LOGGER.addFilter(is_not_about_casts)
    quantization = _quantization(model, dtype, spread=spread is not None)
    arguments = {"quantization_config": quantization} if quantization else {}  # None would undo the model's own
    name, revision = checkpoint.base, revision_of(checkpoint, model)
    check_sizes(name, revision)
    with loading_errors(f"model {name}"):
        base, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=choose_attention(model),
            generation_config=GenerationConfig(),  # not the checkpoint's: see forget_generation_config
            ignore_mismatched_sizes=True,  # they are named below, with their shapes
            output_loading_info=True,
            **NO_PICKLE,
            **arguments,
            **(spread or {}),
        )
    if getattr(base, "_hf_peft_config_loaded", False):  # of a hub id; in a folder `find_checkpoint` has seen it
        raise ArtifactError(
            f"model {name}: got an adapter; expected a whole model. Fix: hf download {name}, and name its folder"
        )
    check_keys(base, info, name, revision)
    check_finite(base, name, revision, dtype)
    forget_generation_config(base, name, revision)
    if checkpoint.adapter is None:
        return base
    if "disk" in {str(place) for place in getattr(base, "hf_device_map", {}).values()}:
        # PEFT 0.21 would write the base's files again, by a path without its root: a relative one is the original's
        raise RecipeError(
            f"cluster.max_memory: {checkpoint.adapter} is an adapter, and some of its base would have to wait on disk, "
            "where an adapter cannot be put on it; allow more (cpu: GiB), or ask what "
            "python -m pipeline export --format merged16 makes of it"
        )
    return attach_adapter(
        base,
        checkpoint.adapter,
        is_trainable=train_adapter,
        autocast_adapter_dtype=not keep_dtype,
        torch_device="cpu",  # PEFT's own choice is the first GPU, in every process
        **(spread or {}),
    )


INT8_LOGGER = logging.getLogger("bitsandbytes.autograd._functions")


def is_not_about_casts(record: logging.LogRecord) -> bool:
    """Whether to show a record: not where bitsandbytes warns, at every int8 matmul, that the input is not float16."""
    return "inputs will be cast from" not in str(record.msg)


def load_for_chat(checkpoint: Checkpoint, model: Model, limits: MaxMemory | None) -> PreTrainedModel | PeftModel:
    """The model of a checkpoint, ready to generate: on this process's device or, with limits, spread by accelerate.

    What the GPUs may not hold lies on the CPU, and what that may not hold on disk; a quantized model's layers that do
    not lie on a GPU are left in 16 bit.
    """
    dtype = choose_dtype(model)
    if limits is None:
        loaded = load_model(checkpoint, model, dtype=dtype).to(device())
        check_computes(loaded, str(checkpoint.adapter or checkpoint.base), device())
        return loaded
    mine = [device().index] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else range(torch.cuda.device_count())
    sizes: dict[int | str, float] = {}
    if limits.gpu is not None:
        sizes |= {index: limits.gpu for index in mine if index is not None}
    if limits.cpu is not None:
        sizes["cpu"] = limits.cpu
    aside = tempfile.mkdtemp(prefix="therefore-")
    atexit.register(shutil.rmtree, aside, ignore_errors=True)
    most = {where: int(size * 2**30) for where, size in sizes.items()} or None
    spread = {"device_map": "auto", "max_memory": most, "offload_folder": aside}
    loaded = load_model(checkpoint, model, dtype=dtype, spread=spread)
    if "disk" not in getattr(loaded, "hf_device_map", {}).values():  # reading all of it once more would take long
        check_computes(loaded, str(checkpoint.adapter or checkpoint.base), input_device(loaded))
    return loaded


def merge_adapter(checkpoint: Checkpoint, model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint's whole model in 16 bit, its adapter merged.

    The base is loaded in `dtype` whatever it was trained in; one that is published in fewer bits is unpacked first.
    What an adapter adds is computed in float32 and rounded once.
    """
    plain_model = replace(model, quantization="none")
    loaded = load_model(replace(checkpoint, adapter=None), plain_model, dtype=dtype)
    if getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize(dtype=dtype)
    if checkpoint.adapter is None:
        return loaded
    adapted = attach_adapter(loaded, checkpoint.adapter, torch_device=str(loaded.device))
    with loading_errors(f"adapter {checkpoint.adapter}"):
        return adapted.merge_and_unload(safe_merge=True)


def check_adapter_alone(checkpoint: Checkpoint, model: Model) -> None:
    """ArtifactError where an adapter does not fit its base model, whose weights are not loaded for it."""
    assert checkpoint.adapter is not None
    with loading_errors(f"model {checkpoint.base}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(checkpoint.base, revision=revision_of(checkpoint, model), **NO_CODE)
        skeleton = AutoModelForCausalLM.from_config(config, **NO_CODE)
    check_adapter_fits(skeleton, checkpoint.adapter)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong: its device or, where it is spread over several, the first that computes."""
    places = getattr(model, "hf_device_map", None)
    if places is None:
        return torch.device(model.device)
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """ArtifactError where the tokenizer belongs to another model."""
    rows = model.get_input_embeddings().num_embeddings
    generation = model.generation_config.eos_token_id if model.generation_config else None
    stops = sorted({*as_list(model.config.get_text_config().eos_token_id), *as_list(generation)})
    problems = []
    if len(tokenizer) > rows:
        problems.append(f"it has {len(tokenizer)} tokens, the model embeds {rows}")
    if stops and tokenizer.eos_token_id not in stops:
        problems.append(f"its stop token is {tokenizer.eos_token_id} ({tokenizer.eos_token}), the model's {stops}")
    if problems:
        raise ArtifactError(
            f"checkpoint {checkpoint.adapter or checkpoint.base}: the tokenizer in {checkpoint.tokenizer} is of "
            f"another model: {' and '.join(problems)}; copy the tokenizer files the model was trained with there"
        )


def add_lora(base: PreTrainedModel, lora: Lora, *, keep_dtype: bool) -> PeftModel:
    """A fresh adapter on a base model. `keep_dtype`: ZeRO-3 needs the adapter in the base's precision."""
    from peft import LoraConfig, get_peft_model

    targets: Any = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config, autocast_adapter_dtype=not keep_dtype)


def _quantization(model: Model, dtype: torch.dtype, *, spread: bool = False) -> BitsAndBytesConfig | None:
    if model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
            llm_int8_enable_fp32_cpu_offload=spread,
        )
    whole = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=spread)
    return whole if model.quantization == "int8" else None


def revision_of(checkpoint: Checkpoint, model: Model) -> str | None:
    """The pinned revision, where the checkpoint's weights are those of the recipe's base model on the hub."""
    return model.revision if checkpoint.base == model.name else None


def unpack_gguf(model: Model, out: Path) -> int:
    """Save the model of a GGUF file, its weights in 32 bit, as an ordinary model folder. Returns its parameters."""
    path = gguf_file(model)
    if path is None:
        raise ArtifactError(f"model.gguf: {model.gguf} is no file, nor one of an installed package")
    with loading_errors(f"model.gguf: {path}"):
        unpacked, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **NO_CODE
        )
        tokenizer = read_tokenizer(path)
    check_keys(unpacked, info, str(path), None)
    config = unpacked.config  # a model that came from a packed file is not saved: its weights move to one that did not
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, **NO_CODE)
    plain.load_state_dict(unpacked.state_dict())
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return int(plain.num_parameters())


# ---------------------------------------------------------------- a model from nothing


def make_random_model(scratch: RandomInit, texts: Iterable[str], template: str, out: Path, seed: int) -> int:
    """Train a tokenizer on `texts`, draw random weights, save both as an ordinary model folder.

    Returns the number of parameters. Byte-level BPE over words with their leading space, so any text can be
    read; words that are frequent in the task become one token.
    """
    format_ = read_template(template)
    tokenizer = train_tokenizer(texts, scratch.vocabulary, special_in(format_))
    tokenizer.chat_template = format_
    tokenizer.eos_token = end_of_turn(tokenizer)
    tokenizer.model_max_length = scratch.context
    config = AutoConfig.for_model(
        scratch.architecture,
        # matrix sides that are multiples of 16 are faster; one row is free, because the tokenizer class of a family may
        # add a token when it is loaded (Qwen2: <|endoftext|>)
        vocab_size=-(-(len(tokenizer) + 1) // 16) * 16,
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.key_value_heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=scratch.context,
        rope_theta=scratch.rope_theta,
        initializer_range=scratch.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[scratch.architecture].random,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **NO_CODE)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return int(model.num_parameters())


def train_tokenizer(texts: Iterable[str], vocabulary: int, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, the same for the same texts.

    `special` are tokens of a chat template beside our own; one that begins a text becomes the bos token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(dict.fromkeys([*SPECIAL_TOKENS.values(), *ROLE_TOKENS, *special])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    roles = list(dict.fromkeys([*ROLE_TOKENS, *special]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS, additional_special_tokens=roles)
