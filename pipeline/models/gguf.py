"""Write a model folder as a GGUF file for llama.cpp, and read the tokenizer of such a file.

    write_gguf(folder, out / "model-q8_0.gguf", "q8_0", name)

A GGUF file holds metadata, tokenizer, chat template and quantized weights. Supported architectures have a `GgufLayout`
in `config/architectures.py`. Tensor names and quantizers are those of the package gguf. The layout is that of
llama.cpp's converter: joined projections stay joined, tied embeddings are written once. Weights are read and written
one at a time, so the file may be larger than the memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.config.architectures import ARCHITECTURES, GgufLayout
from pipeline.core.errors import ArtifactError, LaunchError
from pipeline.models.weight_checks import NO_CODE
from pipeline.workflow.weights import WEIGHTS

# llama.cpp's names for the patterns by which byte-level tokenizers split text before they merge
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {QWEN2: "qwen2", QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = ("smollm", "starcoder", "refact", "command-r")  # numbers are split into digits, then GPT-2's split
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "default": "gpt-2"}
PROBE = (
    "Premise: Suppose there is a closed system of 3 variables, A, B and C.\nHypothesis: A directly causes B.\n\n"
    "<think>\nx = 3.14 and 12 345; naïve → 你好!\n</think>\n  Therefore: Yes"
)


def write_gguf(folder: Path, file: Path, quant: str, name: str, log: Callable[[str], None] = print) -> int:
    """Write the model and tokenizer of `folder` as `file`. Returns its size in bytes.

    Raises ArtifactError for an unsupported architecture, and if the file's tokenizer would split text differently.
    """
    if quant == "q4_k_m":  # the package gguf has no quantizer for this type
        whole = file.with_name(f".{file.name}.f16")
        try:
            _write(folder, whole, "f16", name, log)
            log(f"quantizing to {quant}")
            _quantize(whole, file)
        finally:
            whole.unlink(missing_ok=True)
    else:
        _write(folder, file, quant, name, log)
    check_tokenizer_of(file, AutoTokenizer.from_pretrained(folder, **NO_CODE))
    return file.stat().st_size


def gguf_layout(model_type: str, folder: Path) -> GgufLayout:
    """Return the GGUF layout of a model type. Raises ArtifactError if the registry has none."""
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None or architecture.gguf is None:
        known = ", ".join(name for name, entry in ARCHITECTURES.items() if entry.gguf)
        raise ArtifactError(
            f"{folder}: got a model of type {model_type}; expected one that is written as GGUF here ({known}). "
            "Fix: export it with --format merged16 and use llama.cpp's convert_hf_to_gguf.py on that folder"
        )
    return architecture.gguf


def _write(folder: Path, file: Path, quant: str, name: str, log: Callable[[str], None]) -> None:
    """Write all of a GGUF file, in a quantization of the package gguf."""
    from gguf import GGUFWriter, LlamaFileType

    config = AutoConfig.from_pretrained(folder, **NO_CODE)
    layout = gguf_layout(config.model_type, folder)
    writer = GGUFWriter(file, layout.name)
    tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    writer.add_name(name_in_file(name, tokenizer))
    types = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "f16": "MOSTLY_F16"}
    writer.add_file_type(LlamaFileType[types[quant]])
    writer.add_quantization_version(2)
    _add_config(writer, config, layout)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    tensors = list(_tensors(folder, config, layout, quant))
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.stored_shape, tensor.stored_dtype, tensor.nbytes, raw_dtype=tensor.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(tensor.read())
            if number % 50 == 0:
                log(f"writing tensor {number} of {len(tensors)}")
    finally:
        writer.close()


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its GGUF name, shape, storage type, and a function that reads its values."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    values: Callable[[], np.ndarray[Any, Any]]  # float32

    @property
    def packed(self) -> bool:
        """Whether it is stored as quantized blocks of bytes."""
        return self.kind.name not in ("F32", "F16")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        from gguf import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.kind)) if self.packed else self.shape

    @property
    def stored_dtype(self) -> Any:
        return np.dtype({"F32": np.float32, "F16": np.float16}.get(self.kind.name, np.uint8))

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * int(self.stored_dtype.itemsize)

    def read(self) -> np.ndarray[Any, Any]:
        from gguf.quants import quantize

        values = np.ascontiguousarray(self.values())
        return quantize(values, self.kind) if self.packed else values.astype(self.stored_dtype)


def _tensors(folder: Path, config: Any, layout: GgufLayout, quant: str) -> Iterator[Tensor]:
    """Yield every tensor under llama.cpp's name, the rotary tables of the config first."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    arch = next(key for key, text in MODEL_ARCH_NAMES.items() if text == layout.name)
    assert isinstance(arch, MODEL_ARCH)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for name, values in _rotary_tables(config).items():
        yield Tensor(name, values.shape, GGMLQuantizationType.F32, lambda values=values: values)  # type: ignore[misc]
    for path, source in _stored(folder):
        known = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ArtifactError(f"{path}: GGUF has no name for the tensor {source} of {config.model_type}")
        name = known
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice(source).get_shape())
        heads = _heads_to_interleave(source, config) if layout.rotary_pairs else 0
        kind = GGMLQuantizationType[_kind(name, shape, quant)]

        def values_of(path: Path = path, source: str = source, heads: int = heads) -> np.ndarray[Any, Any]:
            with safe_open(path, "pt") as file:
                values: np.ndarray[Any, Any] = file.get_tensor(source).to(torch.float32).numpy()
            return interleaved(values, heads) if heads else values

        yield Tensor(name, shape, kind, values_of)


def _stored(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield (file, tensor name) for every tensor of a model folder, with one weights file or several and an index."""
    index = folder / WEIGHTS[1]
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.is_file()
        else [WEIGHTS[0]]
    )
    for name in files:
        with safe_open(folder / name, "pt") as file:
            keys = list(file.keys())
        yield from ((folder / name, key) for key in keys)


def _kind(name: str, shape: tuple[int, ...], quant: str) -> str:
    """Return a tensor's storage type: vectors and norms in 32 bit; the embeddings of a 4-bit file in 8 bit."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "F32"
    if quant == "f16" or shape[-1] % 32:  # blocks have 32 values
        return "F16"
    return "Q8_0" if quant == "q8_0" or name in ("token_embd.weight", "output.weight") else "Q4_0"


def _heads_to_interleave(name: str, config: Any) -> int:
    """Return the number of heads of a query or key projection; 0 for another tensor."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of each head from two halves (x0 x1 … y0 y1 …) to pairs (x0 y0 x1 y1 …)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _rotary_tables(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the factors by which context extension scales each rotary frequency, by GGUF tensor name.

    Raises ArtifactError for a rope_type that is not supported.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        width = len(inverse) * 2
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        return {"rope_freqs.weight": (plain / inverse).numpy()}
    if kind == "longrope":
        tables = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.array(rope[key], dtype=np.float32) for name, key in tables.items()}
    if kind not in ("default", "linear"):
        raise ArtifactError(
            f"rope_type: got {kind!r}; expected default, linear, llama3 or longrope. Fix: export it with --format "
            "merged16 and use llama.cpp's convert_hf_to_gguf.py"
        )
    return {}


def _add_config(writer: Any, config: Any, layout: GgufLayout) -> None:
    """Write the sizes of the model and its rotary settings."""
    from gguf import RopeScalingType

    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if layout.rope_dimension:
        writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if layout.long_context:
        first = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(first)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope.get("rope_type") == "longrope":
            ratio = config.max_position_embeddings / first
            factor = math.sqrt(1 + math.log(ratio) / math.log(first)) if ratio > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)


# ---------------------------------------------------------------- tokenizer


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Write vocabulary, token types, merges or scores, special tokens and the chat template."""
    from gguf import TokenType

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ArtifactError(
            f"tokenizer: got type {spec['model']['type']}; expected BPE for GGUF. Fix: export it with --format merged16"
        )
    sentencepiece = bool(spec["model"].get("byte_fallback"))
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds, scores = [], [], []
    for index in range(rows):
        word = words.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in words else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        elif sentencepiece and len(word) == 6 and word.startswith("<0x"):
            kind = TokenType.BYTE
        if index == tokenizer.unk_token_id and sentencepiece:
            kind = TokenType.UNKNOWN
        tokens.append(word)
        kinds.append(kind)
        scores.append(-float(index) if kind == TokenType.NORMAL else 0.0)  # llama.cpp ranks merges by these scores
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else split_name(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if sentencepiece:
        writer.add_token_scores(scores)
    else:
        merges = spec["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, special in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id if sentencepiece else None),
    ):
        if special is not None:
            add(special)
    writer.add_add_bos_token(False)  # the chat templates of families with a bos token write it
    writer.add_chat_template(str(tokenizer.chat_template))


def name_in_file(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the model's name for the file, with `phi3` in it exactly if the tokenizer is Phi-3's.

    For such a name, llama.cpp strips the blanks after special tokens, and assumes that the four tokens below exist.
    """
    plain = re.sub(r"phi-?3", "phi 3", name, flags=re.IGNORECASE)
    known = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(tokenizer.get_vocab())
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    return f"{plain} (phi3)" if known and strips else plain


def split_name(spec: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's split; `gpt-2` if unknown (see `check_tokenizer_of`)."""
    return next((name for pattern, name in SPLITS.items() if json.dumps(pattern) in json.dumps(spec)), "gpt-2")


def check_tokenizer_of(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError, and delete the file, if its tokenizer encodes a prompt differently from the model's."""
    packed = read_tokenizer(file)
    turns = [{"role": "user", "content": PROBE}]
    prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    expected, got = (encode(prompt, add_special_tokens=False)["input_ids"] for encode in (tokenizer, packed))
    if expected != got:
        at = next((k for k, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), len(got))
        file.unlink()
        raise ArtifactError(
            f"{file.name}: GGUF cannot represent this model's tokenizer: got tokens {got[at : at + 4]} for "
            f"{tokenizer.decode(expected[at : at + 4])!r}; expected {expected[at : at + 4]}. Fix: export it with "
            "--format merged16"
        )


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file by llama.cpp's rules.

    The reader of transformers 5.17 takes Llama's bos token for its eos token, and Qwen2's special tokens for text.
    Raises ArtifactError for an unknown kind of tokenizer or an unknown split of text.
    """
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(file).fields

    def value(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    words = value("tokenizer.ggml.tokens", [])
    kinds = value("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(words))
    ids = {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_IDS.items()}
    special = {f"{name}_token": words[index] for name, index in ids.items() if index is not None}
    model = value("tokenizer.ggml.model")
    if model == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges", [])]
        tokenizer = _byte_level(words, merges, value("tokenizer.ggml.pre", "gpt-2"), file)
    elif model == "llama":
        prefix = value("tokenizer.ggml.add_space_prefix", True)
        tokenizer = _sentencepiece(words, value("tokenizer.ggml.scores", []), special.get("unk_token"), prefix)
    else:
        raise ArtifactError(
            f"{file}: got a tokenizer of kind {model!r}; expected gpt2 or llama. Fix: use the model's own folder"
        )
    # a name with phi3 in it makes llama.cpp strip the blanks after special tokens (`name_in_file`)
    strips = "phi3" in str(value("general.name", "")).lower()
    added = [
        AddedToken(
            word,
            special=kind != TokenType.USER_DEFINED,
            normalized=False,
            rstrip=strips and word not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for word, kind in zip(words, kinds, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    found.chat_template = value("tokenizer.chat_template")
    return found


TOKEN_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _byte_level(words: list[str], merges: list[Any], split: str, file: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer that splits text like llama.cpp's split of this name."""
    patterns = {**{name: pattern for pattern, name in SPLITS.items()}, "gpt-2": GPT2, **dict.fromkeys(DIGITS, GPT2)}
    name = SAME.get(split, split)
    if name not in patterns:
        raise ArtifactError(
            f"{file}: got a tokenizer that splits text as {split!r}; expected {', '.join(sorted(patterns))}. "
            "Fix: use the model's own folder"
        )
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    splits = [pre_tokenizers.Digits(individual_digits=True)] if name in DIGITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *splits,
            pre_tokenizers.Split(Regex(patterns[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(words: list[str], scores: list[float], unknown: str | None, prefix: bool) -> Tokenizer:
    """Return a BPE tokenizer that ranks merges by their results' scores; unknown characters become bytes."""
    vocabulary = {word: index for index, word in enumerate(words)}
    ranked = sorted(range(len(words)), key=lambda index: scores[index], reverse=True)
    merges = []
    for word in (words[index] for index in ranked):
        parts = ((word[:at], word[at:]) for at in range(1, len(word)))
        known = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blanks = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*blanks, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return tokenizer


def _quantize(whole: Path, file: Path) -> None:
    """Quantize a 16-bit GGUF file to q4_k_m with llama.cpp. Raises LaunchError if it fails."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), params)
    if code:
        raise LaunchError(f"{file}: llama.cpp's quantizer failed with code {code}; see the log above")
