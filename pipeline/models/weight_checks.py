"""Checks of a checkpoint before its use: all tensors, adapter keys and tokenizer files must fit.

    with loading_errors(f"model {folder}"):   any failure of library code on a user's file becomes one error message
        model, info = AutoModelForCausalLM.from_pretrained(folder, **NO_PICKLE, output_loading_info=True)
    check_keys(model, info, folder, revision)

transformers initialises missing tensors at random and drops unexpected ones with a warning; PEFT does the same for
adapters; NaN values raise no error at all. These checks raise an ArtifactError that names the tensor.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import LoadStateDictInfo
from transformers.utils.hub import cached_file

from pipeline.config import model_files
from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.core.files import read_json
from pipeline.models.read_ahead import local_share
from pipeline.workflow.weights import ADAPTER

if TYPE_CHECKING:
    from peft import PeftModel

# arguments of every call that loads files of others: none of their code and no pickle runs
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
NO_PICKLE: dict[str, Any] = {**NO_CODE, "weights_only": True}
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROBE_TEXT = "Premise: A correlates with B, and 3.14 < 12. Does A cause B? Therefore: no."
NAMES_SHOWN = 4  # tensor names listed in an error


@contextlib.contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """Turn any failure of library code on a user's file into one ArtifactError that begins with `what`.

    A PipelineError, an OSError such as a full disk, and out-of-memory errors pass: they are not errors of the file.
    """
    try:
        yield
    except (PipelineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ArtifactError(f"{what}: cannot be loaded ({_sentence(error)})") from error


def _sentence(error: Exception) -> str:
    """Return the first line of an error, and the second if the first ends with a colon; known errors with a fix."""
    text = str(error).strip()
    if "contains custom code which must be executed" in text or "references custom code contained in" in text:
        return "its files name Python code of their own (auto_map), which never runs here. Fix: use another model"
    if "weights_only" in text or "Weights only load failed" in text:
        return "its .bin file holds more than tensors, and no pickle runs here. Fix: use its safetensors"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    name = type(error).__name__
    plain = isinstance(error, OSError | ValueError | ImportError | SafetensorError | struct.error | RuntimeError)
    return message[:400] if message and plain else f"{name}: {message[:400]}".removesuffix(": ")


def name_list(keys: Iterable[str]) -> str:
    """Return the first few of many names, and the number of the others."""
    listed = sorted(keys)
    return ", ".join(listed[:NAMES_SHOWN]) + (
        f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    )


# ---------------------------------------------------------------- weights


def check_keys(model: PreTrainedModel, info: dict[str, Any], name: str, revision: str | None) -> None:
    """Raise ArtifactError if the files lack a tensor of the model, or have an extra one or one of another shape.

    `info` is transformers' loading info. It already leaves out tied weights, and tensors that the model's class may
    miss or ignore. Under ZeRO-3, transformers does not search for unexpected tensors, so the files are read.
    """
    unexpected = set(info.get("unexpected_keys", ()))
    if is_deepspeed_zero3_enabled() and not getattr(model, "is_quantized", False):
        unexpected |= _unexpected(model, weight_files(name, revision))
    problems = []
    if missing := info.get("missing_keys"):
        problems.append(f"lacks {len(missing)} of the model's tensors ({name_list(missing)})")
    if unexpected:
        problems.append(f"has {len(unexpected)} tensors that are not in the model ({name_list(unexpected)})")
    mismatched = {*info.get("mismatched_keys", ()), *_packed_mismatches(model, weight_files(name, revision))}
    if mismatched:
        shapes = [f"{key} {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in sorted(mismatched)]
        problems.append(f"has tensors of other shapes ({'; '.join(shapes[:NAMES_SHOWN])})")
    problems += [str(error).splitlines()[0] for error in info.get("error_msgs") or ()]
    if problems:
        raise ArtifactError(
            f"model {name}: {'; '.join(problems)}. Fix: use weights and a config.json that were saved together"
        )


def _packed_mismatches(model: PreTrainedModel, files: list[Path]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Return (name, shape, expected shape) of unquantized weights in the files that do not fit a quantized layer.

    transformers does not compare these shapes.
    """
    if not getattr(model, "is_quantized", False):
        return []
    wanted = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            keys = set(opened.keys())
            packed = {key.partition(".weight.")[0] + ".weight" for key in keys if ".weight." in key}
            for key in (wanted.keys() & keys) - packed:
                part = opened.get_slice(key)
                shape = tuple(part.get_shape())
                if part.get_dtype() in ("F32", "F16", "BF16") and shape != wanted[key]:
                    found.append((key, shape, wanted[key]))
    return found


def check_sizes(name: str, revision: str | None) -> None:
    """Raise ArtifactError if a config.json has sizes far beyond its weights: a billion layers would fill the memory."""
    file = file_of(name, "config.json", revision)
    config = read_json(file) if file else None
    if file and not isinstance(config, dict):
        raise ArtifactError(f"{file}: is not a JSON object; expected a model's configuration")
    if file and config is not None:
        model_files.check_sizes(config, file)
    files = weight_files(name, revision)
    if not files or not config:
        return
    shapes: list[tuple[int, ...]] = []
    with loading_errors(f"model {name}"):
        for weights in files:
            with safe_open(weights, "pt") as opened:
                shapes += [tuple(opened.get_slice(key).get_shape()) for key in list(opened.keys())]
    widest = max((size for shape in shapes for size in shape), default=0)
    sizes = ("hidden_size", "intermediate_size", "vocab_size")
    most = {"num_hidden_layers": len(shapes), **dict.fromkeys(sizes, widest)}
    for key, limit in most.items():
        value = config.get(key)
        if isinstance(value, int | float) and value > limit:
            raise ArtifactError(
                f"{file}: {key}: got {value}; expected at most {limit}, the largest that its tensors allow. "
                "Fix: use weights and a config.json that were saved together"
            )


def _unexpected(model: PreTrainedModel, files: list[Path]) -> set[str]:
    """Return names in the files that are not in the model; none if transformers renames or joins tensors on loading."""
    if get_model_conversion_mapping(model, add_legacy=False):
        return set()
    prefix = f"{model.base_model_prefix}."
    known = {key.removeprefix(prefix) for key in model.state_dict()}
    found = {key for file in files for key in tensor_names(file)}
    unknown = {key for key in found if key.removeprefix(prefix) not in known}
    info = LoadStateDictInfo(set(), unknown, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.unexpected_keys)


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file, from its header."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def file_of(name: str, file: str, revision: str | None) -> Path | None:
    """Return the path of a file in a model folder, or in the local cache of a hub model; None if it does not exist."""
    if Path(name).exists():
        return Path(name) / file if (Path(name) / file).is_file() else None
    found = cached_file(
        name,
        file,
        revision=revision or "main",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def weight_files(name: str, revision: str | None) -> list[Path]:
    """Return the safetensors files of a model: the single file, else the shards of its index."""
    single = file_of(name, "model.safetensors", revision)
    if single:
        return [single]
    index = file_of(name, "model.safetensors.index.json", revision)
    shards = sorted(set((read_json(index) or {}).get("weight_map", {}).values())) if index else []
    found = [file_of(name, shard, revision) for shard in shards]
    return [file for file in found if file]


def check_finite(model: PreTrainedModel, name: str, revision: str | None, dtype: torch.dtype) -> None:
    """Raise ArtifactError if a weight is NaN or infinite, or exceeds the range of `dtype`.

    It reads the files, tensor by tensor, because quantization would hide such values. Weights of a .bin file are
    checked in memory.
    """
    with loading_errors(f"model {name}"):
        files = weight_files(name, revision)
        for file in files:
            with safe_open(file, "pt") as opened:
                keys = local_share(list(opened.keys()))  # the node's other processes check the others
                _refuse_infinite(((key, opened.get_tensor(key)) for key in keys), str(file), dtype)
        if not files:
            _refuse_infinite(model.named_parameters(), name, dtype)


def _refuse_infinite(tensors: Iterable[tuple[str, torch.Tensor]], where: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for key, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.device.type == "meta":
            continue
        tensor = tensor.detach()
        if tensor.element_size() == 1:  # torch cannot compare 8-bit floats
            tensor = tensor.to(torch.float32)
        low, high = (float(value) for value in torch.aminmax(tensor))  # makes no copy; NaN propagates
        if not (-most <= low and high <= most):
            if torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{where}: {key} reaches {max(high, -low):g}, beyond the range of {dtype}. Fix: model.dtype=float32"
                )
            count = int((~torch.isfinite(tensor)).sum())
            raise ArtifactError(
                f"{where}: {count} of {tensor.numel()} values of {key} are NaN or infinite; expected finite weights. "
                "Fix: take an earlier checkpoint"
            )


@torch.inference_mode()
def check_computes(model: PreTrainedModel | PeftModel, name: str, where: torch.device) -> None:
    """Raise ArtifactError if the model fails on a few tokens or returns NaN, as with a wrong config.json."""
    with loading_errors(f"model {name}"):
        ids = torch.arange(min(8, model.get_input_embeddings().num_embeddings), device=where)[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if torch.isnan(logits).any():
        raise ArtifactError(
            f"model {name}: computes NaN from finite weights; expected numbers. Fix: compare its config.json with the "
            "model's own, or load it with model.dtype=float32"
        )


# ---------------------------------------------------------------- generation config


def forget_generation_config(model: PreTrainedModel, name: str, revision: str | None) -> None:
    """Replace the model's generation config by its stop tokens alone; callers set everything else."""
    file = file_of(name, "generation_config.json", revision)
    record = read_json(file) if file else None
    listed = record.get("eos_token_id") if isinstance(record, dict) else None
    if listed is None:
        listed = model.config.get_text_config().eos_token_id
    rows = model.get_input_embeddings().num_embeddings
    stops = [token for token in as_list(listed) if 0 <= token < rows]
    model.generation_config = GenerationConfig(eos_token_id=stops or None)


def as_list(ids: Any) -> list[int]:
    """Return the stop tokens of a config, which has one, several or none, as a list; drop values that are not ids."""
    listed = ids if isinstance(ids, list | tuple) else [ids]
    return [token for token in listed if type(token) is int]


# ---------------------------------------------------------------- adapters


def check_adapter_config(folder: Path) -> None:
    """Raise ArtifactError for an adapter config that is invalid, or that names a module to import."""
    record = read_json(folder / ADAPTER)
    if not isinstance(record, dict) or not isinstance(record.get("peft_type"), str):
        raise ArtifactError(f"adapter {folder}: {ADAPTER} is not an adapter's configuration (no peft_type)")
    if record.get("megatron_config"):  # PEFT would import the module that `megatron_core` names
        raise ArtifactError(
            f"adapter {folder}: {ADAPTER} names code to import (megatron_core), which never runs here. "
            "Fix: use another adapter"
        )


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file, by name. A .bin file is read without running its pickle code."""
    with loading_errors(f"adapter {folder}"):
        if (folder / ADAPTER_WEIGHTS[0]).is_file():
            with safe_open(folder / ADAPTER_WEIGHTS[0], "pt") as opened:
                return {key: opened.get_tensor(key) for key in tensor_names(folder / ADAPTER_WEIGHTS[0])}
        found = torch.load(folder / ADAPTER_WEIGHTS[1], map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise ArtifactError(f"adapter {folder}: {ADAPTER_WEIGHTS[1]} is not a table of tensors")
        return found


def attach_adapter(base: PreTrainedModel, folder: Path, **arguments: Any) -> PeftModel:
    """Attach an adapter to its base model; every tensor of its file and every module of the adapter must match.

    `arguments` are those of `PeftModel.from_pretrained`. Raises ArtifactError with the names that do not match.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    check_adapter_config(folder)
    tensors = adapter_tensors(folder)
    _refuse_infinite(tensors.items(), f"adapter {folder}", torch.float32)
    with loading_errors(f"adapter {folder}"):
        # first the ranks: PEFT's own error has a name that is not in any file
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type == "LORA":
            _check_ranks(tensors, config, folder)
        model = PeftModel.from_pretrained(base, str(folder), **arguments)
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = set(model.state_dict())  # PEFT may save a resized embedding with an adapter
    _compare(tensors, wanted, state, folder)
    return model


def check_adapter_fits(skeleton: PreTrainedModel, folder: Path) -> None:
    """Run `attach_adapter`'s checks on a base model without weights (on the meta device)."""
    attach_adapter(skeleton, folder, torch_device="cpu", low_cpu_mem_usage=True)


def _check_ranks(tensors: dict[str, torch.Tensor], config: Any, folder: Path) -> None:
    """Raise ArtifactError if tensors have ranks that are not in the adapter's config."""
    known = {config.r, *(config.rank_pattern or {}).values()}
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith("lora_A.weight")}
    if strange := ranks - known:
        raise ArtifactError(
            f"adapter {folder}: its tensors have rank {', '.join(map(str, sorted(strange)))}, but {ADAPTER} has "
            f"r={config.r}. Fix: use the {ADAPTER} that was saved with them"
        )


def _compare(tensors: dict[str, torch.Tensor], wanted: dict[str, Any], state: set[str], folder: Path) -> None:
    """Raise ArtifactError if an adapter's tensors are not those that its modules need. `state`: other known names."""
    unexpected = {key for key in tensors if key not in wanted and key not in state}
    missing = set(wanted) - set(tensors)
    shapes = [
        f"{key} {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape and value.numel()
    ]
    problems = []
    if unexpected:
        problems.append(f"{len(unexpected)} of its {len(tensors)} tensors fit no module ({name_list(unexpected)})")
    if missing:
        problems.append(f"{len(missing)} tensors of its modules are missing ({name_list(missing)})")
    if shapes:
        problems.append(f"shapes differ ({'; '.join(shapes[:NAMES_SHOWN])})")
    if not tensors:
        problems.append("its file holds no tensors")
    if problems:
        raise ArtifactError(
            f"adapter {folder}: {'; '.join(problems)}. Fix: use the base model and the {ADAPTER} it was trained with"
        )


# ---------------------------------------------------------------- tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerBase, chat: str, name: str) -> None:
    """Raise ArtifactError if a plain sentence or a chat changes when it is encoded and decoded.

    Blanks and case are ignored, because some tokenizers change them. A folder without tokenizer.json yields no tokens.
    """
    for kind, text in (("a plain sentence", PROBE_TEXT), ("its chat format", chat)):
        with loading_errors(f"tokenizer {name}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            back = str(tokenizer.decode(ids, skip_special_tokens=False))
        if _bare(back) != _bare(text):
            raise ArtifactError(
                f"tokenizer {name}: cannot read {kind}: {text[:80]!r} decodes to {back[:80]!r}. Fix: copy "
                "tokenizer.json, tokenizer_config.json and the other tokenizer files from the original model"
            )


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
