"""Load models and tokenizers: chat format, precision, quantization, adapters, checkpoints.

One code path loads a hub id, a local folder, a step's folder, a Trainer checkpoint and an adapter, for training and
for evaluation. `make_random_model` makes a small randomly initialised model, so that the pipeline runs without a hub.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
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
from pipeline.models.read_ahead import read_ahead
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
    weight_files,
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
    """Load the tokenizer of a checkpoint, with the recipe's chat template.

    Its eos token ends a turn in that template (Phi-3.5's own differs). Its pad token differs from eos if the vocabulary
    has such a token. Padding is on the left. Raises RecipeError without a usable chat template, and ArtifactError if a
    sentence or a chat does not decode to itself.
    """
    where = checkpoint.tokenizer
    check_sizes(checkpoint.base, revision_of(checkpoint, model))  # the tokenizer's class is in the model's config
    with loading_errors(f"tokenizer {where}"):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision_of(checkpoint, model), **NO_CODE)
    if model.chat_template:
        tokenizer.chat_template = read_template(model.chat_template)
    if not tokenizer.chat_template:
        raise RecipeError(
            f"model.chat_template: got null, and the tokenizer of {where} has no template. "
            f"Fix: set one of {', '.join(TEMPLATES)} or the path of a .jinja file"
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
    """Return whether a chat template is one of this project or of TRL, which need no trial."""
    return any(path.read_text(encoding="utf-8") == template for path in TEMPLATES.values() if path.is_file())


def _chat_text(tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> str:
    """Return a short question in the tokenizer's chat format."""
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, **arguments))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the stop token of the chat template: the token after an assistant's text. Raises RecipeError."""
    answer = "Therefore"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if answer not in text:
        raise RecipeError(
            "model.chat_template: the template leaves out the assistant's text. "
            f"Fix: use one of {', '.join(TEMPLATES)} or a template that writes it"
        )
    after = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    if after and after[0] in tokenizer.added_tokens_decoder:
        return str(tokenizer.convert_ids_to_tokens(after[0]))
    if tokenizer.eos_token is None:
        raise RecipeError(
            "model.chat_template: an assistant's turn does not end with a special token, and the tokenizer has no eos "
            f"token. Fix: use one of {', '.join(TEMPLATES)} or a template that ends each turn with a special token"
        )
    return str(tokenizer.eos_token)


def read_template(name: str) -> str:
    """Return the text of a chat template, by name or by path. Raises RecipeError for an unknown one."""
    path = TEMPLATES.get(name, Path(name))
    if not path.is_file():
        raise RecipeError(
            f"model.chat_template: got {name!r}; expected one of {', '.join(TEMPLATES)}, the path of a .jinja file, or "
            "null for the model's own template"
        )
    return path.read_text(encoding="utf-8")


def template_opens_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the generation prompt already opens `<think>`, so that completions begin inside the thought."""
    return _chat_text(tokenizer, add_generation_prompt=True).rstrip().endswith(OPEN)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[list[int]]:
    """Return the token ids of each conversation with its generation prompt, the input of generation everywhere."""
    texts = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Any], completions: list[Any]
) -> list[dict[str, list[int]]]:
    """Return the tokens (`input_ids`) and labels of prompt/completion conversations.

    The loss covers exactly the tokens that the model must generate: those after the generation prompt, up to and
    including the stop token. Labels are -100 elsewhere. Text of the template after the stop token is left out, because
    the model never generates it. Raises RecipeError if the chat format renders a prompt differently in training and
    for generation.
    """
    before = prompt_ids(tokenizer, prompts)
    whole = [list(prompt) + list(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    texts = tokenizer.apply_chat_template(whole, tokenize=False)
    rows = []
    for start, ids in zip(before, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        if ids[: len(start)] != start:
            raise RecipeError(
                "model.chat_template: the generation prompt is not how a training text begins "
                f"({tokenizer.decode(start)[-60:]!r} against {tokenizer.decode(ids)[:60]!r}…). Fix: use a template "
                "whose assistant turn begins like its generation prompt"
            )
        ids = ids[: _stop(ids, len(start), tokenizer.eos_token_id)]
        rows.append({"input_ids": list(ids), "labels": [-100] * len(start) + list(ids[len(start) :])})
    return rows


def _stop(ids: list[int], start: int, eos: int) -> int:
    """Return the length of a row: up to the first stop token of its answer."""
    return next((k + 1 for k in range(start, len(ids)) if ids[k] == eos), len(ids))


# ---------------------------------------------------------------- precision


def device() -> torch.device:
    """Return this process's device: its GPU (LOCAL_RANK) or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_capability() -> float | None:
    """Return the compute capability of this process's GPU, such as 7.5; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major + minor / 10


def choose_dtype(model: Model) -> torch.dtype:
    """Return the precision for training and evaluation: bf16 if the hardware supports it, fp16 on older GPUs.

    It reads the compute capability and not `is_bf16_supported`, which is true on Turing GPUs by emulation.
    Raises RecipeError if the recipe sets a precision that this GPU does not support.
    """
    name, gpu = str(model.dtype), compute_capability()
    if name == "auto" and gpu:
        name = half_precision(gpu)
    elif name == "auto":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        name = "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
    if gpu and name == "bfloat16" and half_precision(gpu) != name:
        raise RecipeError(
            f"model.dtype: got bfloat16, which this GPU (compute capability {gpu:g}) does not support. "
            "Fix: model.dtype=auto"
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_attention(model: Model) -> str:
    """Return the attention kernel. `auto`: FlashAttention if installed, and supported by GPU and dtype, else SDPA."""
    if model.attention != "auto":
        return model.attention
    gpu = compute_capability()
    fast = gpu is not None and gpu >= AMPERE and choose_dtype(model) != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if fast else "sdpa"


def repeat_keys_before_ampere() -> None:
    """Make transformers repeat shared keys before it calls SDPA, on GPUs below compute capability 8.

    Without a mask, transformers passes `enable_gqa` instead. On such a GPU only SDPA's math kernel supports it, which
    stores the whole score matrix in float32 (2 to 3 GiB per layer of a 7B model at 2,500 tokens).
    """
    gpu = compute_capability()
    if gpu and gpu < AMPERE:
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False


# ---------------------------------------------------------------- weights


def base_checkpoint(model: Model, data: Path) -> Checkpoint:
    """Return the base model: the one that preprocess made or unpacked in `data`, else the hub id or local folder."""
    if model.random_init or model.gguf:
        return find_checkpoint(str(data / "model"))
    return find_checkpoint(model.name) if Path(model.name).exists() else Checkpoint(model.name, None, model.name)


def initial_checkpoint(model: Model, inputs: Mapping[str, Artifact]) -> Checkpoint:
    """Return the initial weights of training or an evaluation: those of the previous step, else the base model."""
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
    """Load the model of a checkpoint in the recipe's quantization, its adapter unmerged.

    `train_adapter` keeps the adapter's weights trainable, so that GRPO continues from the SFT adapter. `keep_dtype`
    keeps them in the base's precision, as `add_lora` does. `spread` are accelerate's arguments for a model on several
    devices. Raises ArtifactError if the weights do not fit the model, RecipeError for an adapter offloaded to disk.
    """
    repeat_keys_before_ampere()
    if model.quantization == "int8":
        INT8_LOGGER.addFilter(is_not_about_casts)
    quantization = _quantization(model, dtype, spread=spread is not None)
    arguments = (
        {"quantization_config": quantization} if quantization else {}
    )  # None would remove the model's own quantization
    name, revision = checkpoint.base, revision_of(checkpoint, model)
    check_sizes(name, revision)
    with loading_errors(f"model {name}"):
        read_ahead(weight_files(name, revision))
        base, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=choose_attention(model),
            generation_config=GenerationConfig(),  # not the checkpoint's: see forget_generation_config
            ignore_mismatched_sizes=True,  # check_keys reports them, with their shapes
            output_loading_info=True,
            **NO_PICKLE,
            **arguments,
            **(spread or {}),
        )
    if getattr(base, "_hf_peft_config_loaded", False):  # of a hub id; `find_checkpoint` handles folders
        raise ArtifactError(
            f"model {name}: got an adapter; expected a whole model. Fix: run hf download {name}, and pass its folder"
        )
    check_keys(base, info, name, revision)
    check_finite(base, name, revision, dtype)
    forget_generation_config(base, name, revision)
    if checkpoint.adapter is None:
        return base
    if "disk" in {str(place) for place in getattr(base, "hf_device_map", {}).values()}:
        # PEFT 0.21 would write the base's files again, to a path without its root: it could overwrite the originals
        raise RecipeError(
            f"cluster.max_memory: {checkpoint.adapter} is an adapter, and a part of its base model would be on disk, "
            "where PEFT cannot attach an adapter. Fix: allow more (cpu: GiB), or use the merged model of "
            "python -m pipeline export --format merged16"
        )
    return attach_adapter(
        base,
        checkpoint.adapter,
        is_trainable=train_adapter,
        autocast_adapter_dtype=not keep_dtype,
        torch_device="cpu",  # PEFT's default is the first GPU, in every process
        **(spread or {}),
    )


INT8_LOGGER = logging.getLogger("bitsandbytes.autograd._functions")


def is_not_about_casts(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' warning, at every int8 matmul, that it casts the input to float16."""
    return "inputs will be cast from" not in str(record.msg)


def load_for_chat(checkpoint: Checkpoint, model: Model, limits: MaxMemory | None) -> PreTrainedModel | PeftModel:
    """Load a checkpoint's model for generation: on this process's device or, with limits, on several by accelerate.

    Layers beyond the GPUs' limit are on the CPU, those beyond the CPU's limit on disk. Layers of a quantized model that
    are not on a GPU stay in 16 bit.
    """
    dtype = choose_dtype(model)
    if limits is None:
        loaded = load_model(checkpoint, model, dtype=dtype).to(device()).eval()
        check_computes(loaded, str(checkpoint.adapter or checkpoint.base), device())
        return loaded
    gpus = [device().index] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else range(torch.cuda.device_count())
    sizes: dict[int | str, float] = {}
    if limits.gpu is not None:
        sizes |= {index: limits.gpu for index in gpus if index is not None}
    if limits.cpu is not None:
        sizes["cpu"] = limits.cpu
    offload = tempfile.mkdtemp(prefix="therefore-")
    atexit.register(shutil.rmtree, offload, ignore_errors=True)
    max_memory = {where: int(size * 2**30) for where, size in sizes.items()} or None
    spread = {"device_map": "auto", "max_memory": max_memory, "offload_folder": offload}
    loaded = load_model(checkpoint, model, dtype=dtype, spread=spread).eval()
    if "disk" not in getattr(loaded, "hf_device_map", {}).values():  # a second read of the weights takes long
        check_computes(loaded, str(checkpoint.adapter or checkpoint.base), input_device(loaded))
    return loaded


def merge_adapter(checkpoint: Checkpoint, model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """Return a checkpoint's whole model in 16 bit, its adapter merged.

    The base is loaded in `dtype`, independent of the quantization in training. A base that is published in fewer bits
    is dequantized first. The adapter's update is computed in float32 and rounded once.
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


def load_skeleton(checkpoint: Checkpoint, model: Model) -> PreTrainedModel:
    """Return the base model of a checkpoint without weights, with the stop tokens that the whole model would have."""
    name, revision = checkpoint.base, revision_of(checkpoint, model)
    check_sizes(name, revision)
    with loading_errors(f"model {name}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
        skeleton = AutoModelForCausalLM.from_config(config, **NO_CODE)
    forget_generation_config(skeleton, name, revision)
    return skeleton


def check_adapter_alone(checkpoint: Checkpoint, model: Model) -> None:
    """Raise ArtifactError if an adapter does not fit its base model; the base's weights are not loaded."""
    assert checkpoint.adapter is not None
    check_adapter_fits(load_skeleton(checkpoint, model), checkpoint.adapter)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for a model's inputs: its device or, for a model on several, the first that computes."""
    places = getattr(model, "hf_device_map", None)
    if places is None:
        return torch.device(model.device)
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise ArtifactError if the tokenizer belongs to another model."""
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
            f"checkpoint {checkpoint.adapter or checkpoint.base}: the tokenizer in {checkpoint.tokenizer} belongs to "
            f"another model: {' and '.join(problems)}. Fix: copy the model's own tokenizer files to that folder"
        )


def add_lora(base: PreTrainedModel, lora: Lora, *, keep_dtype: bool) -> PeftModel:
    """Add a new LoRA adapter to a base model. `keep_dtype`: ZeRO-3 needs the adapter in the base's precision."""
    from peft import LoraConfig, get_peft_model

    targets: Any = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config, autocast_adapter_dtype=not keep_dtype)


def nf4_config(dtype: torch.dtype, **options: Any) -> BitsAndBytesConfig:
    """Return bitsandbytes' config for nf4 with double quantization, which computes in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


def _quantization(model: Model, dtype: torch.dtype, *, spread: bool = False) -> BitsAndBytesConfig | None:
    """Return the config of the recipe's quantization. `spread` allows layers on the CPU."""
    if model.quantization == "nf4":
        return nf4_config(dtype, bnb_4bit_quant_storage=dtype, llm_int8_enable_fp32_cpu_offload=spread)
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=spread)
    return None


def revision_of(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return the pinned revision if the checkpoint is the recipe's base model on the hub; else None."""
    return model.revision if checkpoint.base == model.name else None


def unpack_gguf(model: Model, out: Path) -> int:
    """Save the model of a GGUF file, dequantized to 32 bit, as a model folder. Returns the number of parameters.

    Raises ArtifactError for a file that does not exist or cannot be read.
    """
    path = gguf_file(model)
    if path is None:
        raise ArtifactError(f"model.gguf: got {model.gguf}; expected a file, or one of an installed package")
    with loading_errors(f"model.gguf: {path}"):
        unpacked, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **NO_CODE
        )
        tokenizer = read_tokenizer(path)
    check_keys(unpacked, info, str(path), None)
    config = unpacked.config  # transformers refuses to save a model from GGUF, so its weights move to a plain one
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, **NO_CODE)
    plain.load_state_dict(unpacked.state_dict())
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return int(plain.num_parameters())


# ---------------------------------------------------------------- random initialisation


def make_random_model(
    scratch: RandomInit, texts: Iterable[str], template: str, out: Path, seed: int, prompts: Iterable[str] = ()
) -> int:
    """Train a tokenizer on `texts` and `prompts`, initialise weights at random, and save both as a model folder.

    Returns the number of parameters. The tokenizer is a byte-level BPE over words with their leading space, so it
    encodes any text; words that are frequent in the task become one token, and with `tokens: phrases` so do phrases
    of the prompts.
    """
    chat_template = read_template(template)
    phrases = scratch.tokens == "phrases"
    texts, prompts = (texts, prompts) if phrases else (chain(prompts, texts), ())
    tokenizer = train_tokenizer(texts, scratch.vocabulary, special_in(chat_template), prompts)
    tokenizer.chat_template = chat_template
    tokenizer.eos_token = end_of_turn(tokenizer)
    tokenizer.model_max_length = scratch.context
    config = AutoConfig.for_model(
        scratch.architecture,
        # multiples of 16 are faster; one row is spare, because some tokenizer classes add a token when they are loaded
        # (Qwen2: <|endoftext|>)
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
    if phrases:
        check_split(tokenizer, scratch.architecture, out)
    return int(model.num_parameters())


def check_split(tokenizer: PreTrainedTokenizerFast, architecture: str, out: Path) -> None:
    """Raise RecipeError where transformers loads the tokenizer of `out` with another split than it was trained with.

    For some architectures it takes that of their published models, whatever the file says: no phrase is ever found.
    """
    loaded = AutoTokenizer.from_pretrained(out, **NO_CODE).backend_tokenizer.pre_tokenizer
    if str(loaded) != str(tokenizer.backend_tokenizer.pre_tokenizer):
        raise RecipeError(
            f"model.random_init.tokens: got phrases with architecture {architecture}, whose tokenizers transformers "
            "always splits into words. Fix: model.random_init.architecture=llama, or model.random_init.tokens=words"
        )


# a word with its leading space
WORD = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
# words in a row, without punctuation and names of variables, which are single capital letters
PHRASE = r" ?\b\p{Lu}\b|(?:(?! ?\b\p{Lu}\b) ?[\p{L}\p{N}]+)+| ?[^\s\p{L}\p{N}]+|\s"


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, special: Sequence[str] = (), prompts: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens; equal texts give an equal tokenizer.

    `special` are a chat template's special tokens, in addition to the project's. Of `prompts`, whole phrases become
    tokens (superword BPE, Liu et al. 2025), but never with the name of a variable: attention looks up facts, not
    words. Of `texts` only words do, because each word of an answer is a decision of the model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    prompts = list(prompts)
    corpus: Iterable[str] = texts
    if prompts:
        corpus = chain(prompts, (word for text in texts for word, _ in words.pre_tokenize_str(text)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PHRASE), "isolated") if prompts else words,
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
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    roles = list(dict.fromkeys([*ROLE_TOKENS, *special]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS, additional_special_tokens=roles)
