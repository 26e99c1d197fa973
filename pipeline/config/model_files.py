"""What a model is before it is downloaded: its `config.json`, of the local cache, of a folder, or bundled.

    config = model_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")     a dict, or None where nobody knows

Bundled are the configurations of the recipes' models, in configs/models/: sizes and nothing else, written from the
models' cards; tests compare their parameter counts with the published ones.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

from pipeline.config.architectures import DIMS, architecture_of
from pipeline.config.recipe import CONFIGS, Model
from pipeline.core.errors import ArtifactError
from pipeline.core.files import read_json

BUNDLED = CONFIGS / "models"
# of these families TRL ships the real templates, and of R1-Distill's one that does not delete thoughts
FAMILIES = ("deepseek_r1_distill", "llama3", "phi3_5", "qwen2_5", "qwen3", "gemma3")
OURS = ("think", "chatml", "instruction", "plain")
HERE = Path(__file__).parent.parent / "chat_templates"
_TRL = importlib.util.find_spec("trl")  # found, not imported
TRL = Path(_TRL.origin if _TRL and _TRL.origin else "trl").parent / "chat_templates"
TEMPLATES = {
    **{name: HERE / f"{name}.jinja" for name in OURS},
    **{name: TRL / f"{name}_training.jinja" for name in FAMILIES},
}
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]+[|｜]>|<(?:start|end)_of_turn>")
# what an export is
FORMATS = {
    "adapter": "A LoRA adapter: what training has added, to be loaded on its base model.",
    "merged16": "The whole model in 16 bit.",
    "merged4": "The whole model, merged in 16 bit and then quantized to 4 bit (bitsandbytes nf4).",
    "gguf": "The whole model in one GGUF file, for llama.cpp and what is built on it.",
}
QUANTS = ("q8_0", "q4_0", "q4_k_m", "f16")  # of a GGUF file


def model_config(model: Model) -> dict[str, Any] | None:
    """The configuration of a recipe's base model, without network and without torch; None for one from scratch.

    ArtifactError where the config.json of a folder names sizes that are none.
    """
    if model.random_init:
        return None
    folder = Path(model.name)
    if folder.is_dir():
        config = _dict(read_json(folder / "config.json"))
        check_sizes(config or {}, folder / "config.json")
        return config
    bundled = _dict(read_json(BUNDLED / f"{model.name.replace('/', '--')}.json"))
    return bundled or _cached(model)


def check_sizes(config: dict[str, Any], file: Path) -> None:
    """ArtifactError where a size in a config.json is not a whole number of at least 1, or its rotation has no base."""
    architecture = architecture_of(config)
    needed = tuple(architecture.dims.values()) if architecture else ()
    for key in dict.fromkeys((*needed, *DIMS.values(), "num_key_value_heads", "head_dim", "max_position_embeddings")):
        value = config.get(key)
        if (key in needed or value is not None) and (type(value) is not int or value < 1):
            raise ArtifactError(
                f"{file}: {key}: got {value!r}; expected a whole number of at least 1. "
                "Fix: use the config.json that the model was saved with"
            )
    rope = config.get("rope_parameters")
    for key, value in (("rope_theta", config.get("rope_theta")), *(rope.items() if isinstance(rope, dict) else ())):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "rope_theta" and value is not None and not (number and 0 < value < math.inf):
            raise ArtifactError(
                f"{file}: rope_theta: got {value!r}; expected a number above 0. "
                "Fix: use the config.json that the model was saved with"
            )


def gguf_file(model: Model) -> Path | None:
    """Where the file of `model.gguf` is: a path, or package/file of an installed package; None where it is not."""
    name = model.gguf or ""
    if Path(name).is_file():
        return Path(name)
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    found = [Path(place) / file for place in places or () if (Path(place) / file).is_file()]
    return found[0] if found else None


def special_in(template: str) -> list[str]:
    """The special tokens that a chat template writes, in their order."""
    return list(dict.fromkeys(SPECIAL.findall(template)))


def special_tokens(model: Model) -> set[str]:
    """The special tokens of a model's tokenizer, from its folder or the local cache; empty where it is not there."""
    folder = Path(model.name)
    tokenizer = _dict(read_json(folder / "tokenizer.json")) if folder.is_dir() else _cached(model, "tokenizer.json")
    added = (tokenizer or {}).get("added_tokens")
    return {str(token["content"]) for token in added or () if isinstance(token, dict) and "content" in token}


def _cached(model: Model, file: str = "config.json") -> dict[str, Any] | None:
    if model.name.count("/") != 1:  # before the import, which takes longer than all of `check`
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model.name, file, revision=model.revision)
    return _dict(read_json(Path(path))) if isinstance(path, str) else None


def _dict(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None
