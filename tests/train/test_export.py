"""export: what is written loads again, gives the same logits and the same text, and says what it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from fake_hub import COMMIT, receive
from running import only, run_cli
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline.ask import AskRequest as AskOrder
from pipeline.ask import ask
from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Lora, Model, RandomInit, read
from pipeline.core.errors import ArtifactError, PlanError
from pipeline.core.hashing import plain
from pipeline.core.schema import parse
from pipeline.export import evaluations, lineage
from pipeline.export import run as export
from pipeline.models.gguf import gguf_layout, interleaved, name_in_file, read_tokenizer, write_gguf
from pipeline.models.loading import (
    add_lora,
    load_model,
    load_tokenizer,
    make_random_model,
    merge_adapter,
    prompt_ids,
    train_tokenizer,
)
from pipeline.report import _settings
from pipeline.workflow.artifact import Artifact, open_artifact
from pipeline.workflow.plan import make_plan, spec_of
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime
from pipeline.workflow.single_step import evaluation_plan, export_plan
from pipeline.workflow.stage import Export, StepSpec, read_spec, write_spec
from pipeline.workflow.weights import find_checkpoint

ARCHITECTURES = ("qwen2", "llama", "phi3", "qwen3")
ANSWER = "Pairs: A B linked. Links: A - B. naïve → 你好\n</think>\nTherefore: Yes"
QUESTION = [{"role": "user", "content": "A correlates with B."}]
MODEL = Model("m", None, None, None, None, "none", "auto", "float32")
LORA = Lora(True, 8, 16.0, 0.0, ("all-linear",))


def fit(model: Any, tokenizer: Any, steps: int) -> None:
    """Learn one answer by heart, so that its tokens stand far above all others."""
    start = prompt_ids(tokenizer, [QUESTION])[0]
    ids = torch.tensor([start + tokenizer(ANSWER + tokenizer.eos_token, add_special_tokens=False)["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor(prompt_ids(tokenizer, [QUESTION]))
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits[0]).float()


def greedy(model: Any, tokenizer: Any) -> str:
    ids = torch.tensor(prompt_ids(tokenizer, [QUESTION]))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each architecture that knows one answer."""
    folder = tmp_path_factory.mktemp(request.param)
    heads = 4 if request.param == "phi3" else 2
    scratch = RandomInit(request.param, 600, 64, 2, 4, heads, 128, 256, 50000.0, 0.05)
    make_random_model(scratch, [f"A correlates with B. <think>\n{ANSWER}"] * 20, "think", folder, 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if request.param == "qwen2":
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # drawn as zeros, they would not be missed
                torch.nn.init.normal_(p, std=0.1)
    fit(model, AutoTokenizer.from_pretrained(folder), 60)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["none", "nf4"])
def adapted(
    request: pytest.FixtureRequest, learned: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Model]:
    """An adapter that was trained on each of them, on whole and on 4-bit weights, and how it was trained."""
    trained = replace(MODEL, quantization=request.param)
    folder = tmp_path_factory.mktemp("adapter")
    checkpoint = find_checkpoint(str(learned))
    torch.manual_seed(0)
    model = add_lora(load_model(checkpoint, trained, dtype=torch.float32), LORA, keep_dtype=False)
    tokenizer = load_tokenizer(checkpoint, trained)
    tokenizer.eos_token = "<|user|>"  # something else to learn
    fit(model, tokenizer, 8)
    model.save_pretrained(folder)
    load_tokenizer(checkpoint, trained).save_pretrained(folder)
    return folder, trained


def run_export(checkpoint: Path, out: Path, *words: str, format: str, quant: str | None = None) -> Path:
    """The stage itself, in this process, on the order that the command line would write."""
    plan = export_plan(str(checkpoint), ["tiny", "model.dtype=float32", *words], format=format, quant=quant, out=out)
    order = spec_of(plan.steps[0], plan.cluster)
    out.mkdir(parents=True, exist_ok=True)
    progress = ProgressFile(None, "export")
    export(order.recipe, {}, out, Runtime(plan.cluster, progress, 0, 1, out, None, order.options))
    return out / {"adapter": "adapter", "gguf": "gguf"}.get(format, "model")


def test_an_order_is_data_and_no_secret_of_the_environment_enters_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step.json of somebody else names ${oc.env:…} wherever a text may stand; each text stays as it is."""
    token = "hf_planted0token"
    monkeypatch.setenv("HF_TOKEN", token)
    planted = "What is ${oc.env:HF_TOKEN}? ${seed} ${x"
    recipe, _ = read("tiny", ["model.dtype=float32", "evaluate.max_new_tokens=4"])
    assert recipe is not None
    recipe = replace(
        recipe,
        model=replace(recipe.model, revision=planted),
        task=replace(recipe.task, params={**recipe.task.params, "instruction": planted}),
        evaluate=replace(recipe.evaluate, prompts=(planted,)),
    )
    cluster, _ = read_cluster("local")
    assert cluster is not None
    step = tmp_path / "runs" / "tiny" / "sft-0"
    make_random_model(
        RandomInit("qwen2", 400, 16, 1, 2, 2, 32, 128, 10000.0, 0.05), ["A B"] * 9, "think", step / "model", 0
    )
    write_spec(step, StepSpec("sft", "sft", "0", {}, recipe, cluster, {}))
    place = str(step / "model")
    for plan in (export_plan(place, format="merged16"), evaluation_plan(place, runs=tmp_path / "runs")):
        folder = tmp_path / plan.steps[0].stage
        write_spec(folder, spec_of(plan.steps[0], plan.cluster))
        order = read_spec(folder)
        assert order.recipe.evaluate.prompts == (planted,)
        assert order.recipe.task.params["instruction"] == planted
        if order.stage == "export":
            runtime = Runtime(order.cluster, ProgressFile(None, "export"), 0, 1, folder, None, order.options)
            export(order.recipe, {}, folder, runtime)
            assert planted in (folder / "model" / "README.md").read_text(encoding="utf-8")
    artifact = Artifact("sft", "sft", "tiny", "0", {}, {}, {}, {}, {}, step)
    (tmp_path / "settings.yaml").write_text(_settings(artifact), encoding="utf-8")
    options = {"question": planted, "interactive": False, "sample": False, "max_new_tokens": 3, "max_memory": None}
    options |= dict.fromkeys(("temperature", "top_p", "top_k", "seed"))
    asked, problems = parse(
        AskOrder,
        json.loads(json.dumps({"checkpoints": [{"checkpoint": place, "recipe": plain(recipe)}], "options": options})),
    )
    assert asked is not None, problems
    ask(asked)
    seen = capsys.readouterr()
    assert token not in seen.out + seen.err
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert token.encode() not in file.read_bytes(), file


# ---------------------------------------------------------------- merged, and adapters


def test_a_merged_model_reloads_with_the_logits_of_base_and_adapter(
    adapted: tuple[Path, Model], learned: Path, tmp_path: Path
) -> None:
    adapter, _ = adapted
    checkpoint = find_checkpoint(str(adapter))
    tokenizer = load_tokenizer(checkpoint, MODEL)
    separate = logits(load_model(checkpoint, MODEL, dtype=torch.float32), tokenizer)
    base = logits(AutoModelForCausalLM.from_pretrained(learned), tokenizer)
    place = run_export(adapter, tmp_path / "out", format="merged16")
    again = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert not getattr(again.config, "quantization_config", None)
    near, far = (logits(again, tokenizer) - separate).abs().max(), (base - separate).abs().max()
    assert near < 0.05 * separate.std()  # bfloat16 has 8 bits
    assert far > 5 * near  # and the adapter is there


def test_merging_is_exact_where_the_precision_allows_it(adapted: tuple[Path, Model]) -> None:
    checkpoint = find_checkpoint(str(adapted[0]))
    tokenizer = load_tokenizer(checkpoint, MODEL)
    whole = merge_adapter(
        checkpoint, adapted[1], torch.float32
    )  # trained on 4 bit or not: merged into what was published
    separate = logits(load_model(checkpoint, MODEL, dtype=torch.float32), tokenizer)
    assert torch.allclose(logits(whole, tokenizer), separate, atol=1e-4)


def test_four_bits_are_made_of_the_merged_model(learned: Path, tmp_path: Path) -> None:
    place = run_export(learned, tmp_path / "out", format="merged4")
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["load_in_4bit"]) == ("nf4", True)
    with safe_open(place / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith(".weight.quant_state.bitsandbytes__nf4")]  # noqa: SIM118
    assert len(packed) >= 8
    tokenizer = AutoTokenizer.from_pretrained(place)
    four = AutoModelForCausalLM.from_pretrained(place)
    expected = f"{ANSWER}<|end|>"
    assert greedy(four, tokenizer) == greedy(AutoModelForCausalLM.from_pretrained(learned), tokenizer) == expected
    assert not (tmp_path / "out" / ".merged16").exists()
    # a base that is published in 4 bit is unpacked before anything is merged into it
    unpacked = merge_adapter(find_checkpoint(str(place)), replace(MODEL, quantization="nf4"), torch.bfloat16)
    assert {p.dtype for p in unpacked.parameters()} == {torch.bfloat16}
    assert (logits(unpacked, tokenizer) - logits(four, tokenizer)).abs().max() < 0.1


def test_an_adapter_goes_out_as_it_is(adapted: tuple[Path, Model], tmp_path: Path) -> None:
    place = run_export(adapted[0], tmp_path / "out", format="adapter")
    source = adapted[0] / "adapter_model.safetensors"
    assert (place / "adapter_model.safetensors").read_bytes() == source.read_bytes()
    assert find_checkpoint(str(place.parent)).adapter == place
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= {
        path.name for path in place.iterdir()
    }
    assert "The base model is a local folder" in (place / "README.md").read_text()


# ---------------------------------------------------------------- GGUF


def in_llama_cpp(file: Path, tokenizer: Any) -> str:
    """The greedy text by llama.cpp itself, in a process of its own: its threads and torch's do not go together."""
    prompt = tokenizer.apply_chat_template([QUESTION[0]], add_generation_prompt=True, tokenize=False)
    code = (
        "import json, sys, llama_cpp, numpy as np\n"
        "model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False, logits_all=True)\n"
        "model.eval(model.tokenize(sys.argv[2].encode(), add_bos=False, special=True))\n"
        "out = []\n"
        "while len(out) < 60 and model.token_eos() not in out:\n"
        "    out.append(int(np.argmax(model.scores[model.n_tokens - 1])))\n"
        "    model.eval(out[-1:])\n"
        "print(json.dumps(out))\n"
    )
    words = [sys.executable, "-c", code, str(file), prompt]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return str(tokenizer.decode(json.loads(done.stdout)))


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "f16"])
def test_a_gguf_file_answers_as_its_source(learned: Path, tmp_path: Path, quant: str) -> None:
    place = run_export(learned, tmp_path / "out", format="gguf", quant=quant)
    file = only(place, "*.gguf")
    source = AutoModelForCausalLM.from_pretrained(learned)
    packed = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32)
    tokenizer = read_tokenizer(file)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert greedy(packed, tokenizer) == greedy(source, AutoTokenizer.from_pretrained(learned)) == f"{ANSWER}<|end|>"
    if importlib.util.find_spec("llama_cpp") is not None:
        assert in_llama_cpp(file, tokenizer) == f"{ANSWER}<|end|>"
    off = (logits(packed, tokenizer) - logits(source, tokenizer)).abs().mean()
    assert off < {"f16": 0.02, "q8_0": 0.05, "q4_0": 0.5}[quant]


def test_what_a_gguf_file_says(learned: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    place = run_export(learned, tmp_path / "out", format="gguf", quant="q4_0")
    reader = GGUFReader(only(place, "*.gguf"))
    config = json.loads((learned / "config.json").read_text())
    arch = config["model_type"]

    def said(key: str) -> Any:
        return reader.fields[key].contents()

    assert said("general.architecture") == arch
    assert said(f"{arch}.rope.freq_base") == config["rope_parameters"]["rope_theta"]
    assert said(f"{arch}.attention.head_count_kv") == config["num_key_value_heads"]
    assert said("tokenizer.ggml.eos_token_id") == config["eos_token_id"]
    assert said("tokenizer.chat_template") == (learned / "chat_template.jinja").read_text()
    assert len(said("tokenizer.ggml.tokens")) == config["vocab_size"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied: written once


def sentencepiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like Phi-3's: words with their blank as ▁, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + letters, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if token["content"] in special]
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    found.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    found.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return found


@pytest.mark.parametrize("kind", ["sentencepiece", "llama3", "longrope", "untied"])
def test_what_families_have_beside_the_plain_layout(tmp_path: Path, kind: str) -> None:
    """Phi-3's tokenizer, the rotary tables of long contexts, an output that is not the embedding."""
    from gguf import GGUFReader

    architecture: Literal["phi3", "llama"] = "phi3" if kind in ("sentencepiece", "longrope") else "llama"
    scratch = RandomInit(architecture, 400, 64, 1, 4, 4, 128, 256, 10000.0, 0.05)
    texts = [f"A correlates with B. <think> {ANSWER}"] * 20
    make_random_model(scratch, texts, "think", tmp_path / "model", 0)
    config, tokenizer = (
        AutoConfig.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    if kind == "sentencepiece":
        template, tokenizer = tokenizer.chat_template, sentencepiece(texts)
        tokenizer.chat_template = template
        config.vocab_size = len(tokenizer) + 3
    short = [1.0, 1.2, 1.5, 2.0, 1.0, 1.1, 1.3, 1.7]
    if kind == "llama3":
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, **bounds}
    if kind == "longrope":
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "short_factor": short,
            "long_factor": [2.0] * 8,
            "factor": 4.0,
        }
        config.original_max_position_embeddings, config.max_position_embeddings = 64, 256
    config.tie_word_embeddings = kind != "untied"
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "model", tmp_path / "gguf" / "x.gguf", "f16", "x")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "gguf" / "x.gguf").tensors}
    if kind == "sentencepiece":
        packed = read_tokenizer(tmp_path / "gguf" / "x.gguf")
        for text in ("A correlates with B.", "  A", "<|user|>A B<|assistant|><think>\nx", "naïve → 你好, 7€\n"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert packed(text, add_special_tokens=False)["input_ids"] == ids
    if kind == "llama3":
        plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
        turned = model.model.rotary_emb.inv_freq.numpy()
        assert np.allclose(plain / tensors["rope_freqs.weight"], turned, rtol=1e-5)
        assert tensors["rope_freqs.weight"].max() == pytest.approx(8.0)
    if kind == "longrope":
        assert tensors["rope_factors_short.weight"].tolist() == pytest.approx(short)
        assert set(tensors["rope_factors_long.weight"].tolist()) == {2.0}
    assert ("output.weight" in tensors) == (kind == "untied")


def test_the_name_phi3_is_what_llama_cpp_takes_it_for() -> None:
    """It looks four tokens up where a name has phi3 in it, and fails to load a file without them."""
    plain = train_tokenizer(["A correlates with B."] * 20, 400)
    assert name_in_file("phi3.5-smoke-test sft", plain) == "phi 3.5-smoke-test sft"
    real = train_tokenizer(["A correlates with B."] * 20, 400, ["<unk>", "<s>", "</s>", "<|endoftext|>"])
    assert name_in_file("Phi-3.5 sft", real) == "phi 3.5 sft"
    real.add_tokens([AddedToken("<|ends|>", special=True, rstrip=True)])
    assert name_in_file("phi3.5 sft", real) == "phi 3.5 sft (phi3)"


def test_k_quants_are_llama_cpps_own_and_say_so_where_it_is_missing(learned: Path, tmp_path: Path) -> None:
    words = ["export", "--ckpt", str(learned), "tiny", "--format", "gguf", "--quant", "q4_k_m", "--runs", str(tmp_path)]
    done = run_cli(*words)
    if importlib.util.find_spec("llama_cpp") is None:
        assert done.returncode == 2
        assert "--quant q4_k_m: package llama-cpp-python, whose quantizer it uses, is not installed" in done.stderr
        assert not any(tmp_path.iterdir())
        return
    assert done.returncode == 0, done.stderr
    place = only(tmp_path, "exports/*") / "gguf"
    packed = AutoModelForCausalLM.from_pretrained(place, gguf_file="tiny-q4_k_m.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(learned)
    assert greedy(packed, tokenizer) == f"{ANSWER}<|end|>" == in_llama_cpp(only(place, "*.gguf"), tokenizer)


def test_an_architecture_without_a_layout_is_left_to_llama_cpps_converter() -> None:
    with pytest.raises(ArtifactError, match=r"of type gemma3_text; .*convert_hf_to_gguf\.py on that folder"):
        gguf_layout("gemma3_text", Path("model"))


def test_heads_are_turned_as_llama_cpp_turns_them_and_back() -> None:
    """transformers' own reverse is the judge."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = np.random.default_rng(0).normal(size=(4 * 6, 5))
    back = LlamaTensorProcessor()._reverse_permute_weights(interleaved(rows, 4), 4, 4)
    assert np.array_equal(back, rows)
    assert interleaved(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_architecture_that_cannot_be_written_is_told(learned: Path, tmp_path: Path) -> None:
    shutil.copytree(learned, tmp_path / "other")
    config = json.loads((learned / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    with pytest.raises(ArtifactError, match="got a model of type gemma2; expected one that is written as GGUF here"):
        write_gguf(tmp_path / "other", tmp_path / "x.gguf", "q8_0", "x")


# ---------------------------------------------------------------- the command, and its card


def test_a_trained_run_is_exported_and_asked(nano: Path, tmp_path: Path) -> None:
    source = only(nano, "tiny/grpo-*")
    words = ["export", "--ckpt", str(source), "--format", "merged16", "--runs", str(tmp_path)]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    folder = only(tmp_path, "exports/tiny-grpo-merged16-*")
    assert f"next:\n  python -m pipeline chat --ckpt {folder}" in done.stdout
    artifact = open_artifact(folder, deep=True)
    assert artifact.fingerprint == folder.name.rpartition("-")[2]
    assert artifact.payload["inputs"] == {"source": source.name}
    again = run_cli(*words)
    assert "this export is done already" in again.stdout
    asked = export_plan(str(folder), [], format="gguf")  # an export is a checkpoint, with the recipe it was made by
    assert asked.steps[0].recipe.name == "tiny"

    card = (folder / "model" / "README.md").read_text()
    for words_ in (
        "tags: [therefore, corr2cause, sft, grpo]",
        "- grpo: 2 steps",
        "| grpo | test | 12 | 0.",
        "| base | test | 12 | 0.",
        f"`{source.name.rpartition('-')[2]}`",
        "Rows: sft 96, grpo 32, test 12",
    ):
        assert words_ in card
    assert str(tmp_path) not in card
    assert str(nano) not in card
    assert "SMOKE TEST" not in card


def test_a_batch_script_prepares_an_export(nano: Path, tmp_path: Path) -> None:
    """What slurm/export.slurm runs before the stage; and the whole export as a job."""
    words = ["--ckpt", str(only(nano, "tiny/sft-*")), "--format", "gguf", "--quant", "q4_0", "--runs", str(tmp_path)]
    done = run_cli("prepare", "--stages", "export", *words)
    assert done.returncode == 0, done.stderr
    order = read_spec(Path(done.stdout.strip()))
    assert isinstance(order.options, Export)
    assert (order.stage, order.options.format, order.options.quant) == ("export", "gguf", "q4_0")
    script = run_cli("export", *words, "--launcher", "slurm", "--push", "lab/small")
    assert (script.returncode, "nodes have no internet; export first" in script.stderr) == (2, True)
    bare = run_cli("prepare", "--stages", "export", "tiny", "--runs", str(tmp_path))
    assert (bare.returncode, "an export needs --ckpt DIR and --format" in bare.stderr) == (2, True)


def test_the_line_and_the_figures_of_a_checkpoint(nano: Path) -> None:
    line = lineage(only(nano, "tiny/grpo-*"))
    assert [artifact.stage for artifact in line] == ["preprocess", "sft", "grpo"]
    assert [model for model, _ in evaluations(line)] == ["base", "sft", "grpo"]
    assert [model for model, _ in evaluations(lineage(only(nano, "tiny/sft-*")))] == ["base", "sft"]


def test_an_export_is_asked_in_the_precision_it_has(adapted: tuple[Path, Model], tmp_path: Path) -> None:
    """Trained on 4-bit weights, merged in 16: nobody quantizes it again on the way in."""
    words = [f"model.quantization={adapted[1].quantization}", "lora.enabled=true", "model.random_init=null"]
    plans = {
        format: export_plan(str(adapted[0]), ["qwen1.5b", *words], format=format) for format in ("merged16", "adapter")
    }
    assert plans["merged16"].steps[0].recipe.model.quantization == "none"
    assert plans["adapter"].steps[0].recipe.model.quantization == adapted[1].quantization
    options = plans["merged16"].steps[0].options
    assert isinstance(options, Export)
    assert options.trained_in == adapted[1].quantization
    place = run_export(adapted[0], tmp_path / "out", "model.random_init=null", *words, format="merged16")
    card = (place / "README.md").read_text()
    assert ("weights in training: nf4" in card) == (adapted[1].quantization == "nf4")


def test_a_smoke_test_is_marked_as_one(learned: Path, tmp_path: Path) -> None:
    place = run_export(learned, tmp_path / "out", "smoke_test=true", format="merged16")
    card = (place / "README.md").read_text()
    assert "**SMOKE TEST of a shrunken model with random weights: nothing here is a result.**" in card
    assert "smoke-test]" in card.splitlines()[3]


def test_what_cannot_be_exported_is_told(learned: Path, tmp_path: Path) -> None:
    ckpt = str(learned)
    with pytest.raises(PlanError, match="is a whole model without an adapter; use merged16"):
        export_plan(ckpt, ["tiny"], format="adapter")
    with pytest.raises(PlanError, match="--quant q4_0: of a GGUF file, but the format is merged16"):
        export_plan(ckpt, ["tiny"], format="merged16", quant="q4_0")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(PlanError, match="there is something else in it already"):
        export_plan(ckpt, ["tiny"], format="merged16", out=tmp_path)
    with pytest.raises(
        PlanError, match=r"--stages: got export; expected stages of a run\. Fix: python -m pipeline export --ckpt DIR"
    ):
        make_plan(["tiny"], stages=["export"])
    done = run_cli("export", "--ckpt", ckpt, "--format", "merged15")
    assert done.returncode == 2
    assert "invalid choice: 'merged15'" in done.stderr


# ---------------------------------------------------------------- push


HUB = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # weights by LFS: the stand-in knows no Xet


@pytest.fixture(scope="module")
def done_before(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of an export that is done, and the folder of its files."""
    runs = tmp_path_factory.mktemp("pushed")
    words = ["export", "--ckpt", str(learned), "tiny", "--format", "merged16", "--runs", str(runs)]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    return words, only(runs, "exports/*") / "model"


@pytest.mark.parametrize("learned", ["qwen2"], indirect=True)
def test_a_push_puts_every_file_on_the_hub(done_before: tuple[list[str], Path], tmp_path: Path) -> None:
    words, place = done_before
    env = {**HUB, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_write"}
    with receive("lab/small", tmp_path / "hub") as (address, calls):
        done = run_cli(*words, "--push", "lab/small", env={**env, "HF_ENDPOINT": address})
        assert done.returncode == 0, done.stderr
    assert f"pushed to lab/small: {address}/lab/small/commit/{COMMIT}" in done.stdout
    sent = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    assert sent == {path.name: path.read_bytes() for path in place.iterdir()}
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(sent)
    created = next(body for path, body in calls if path == "/api/repos/create")
    assert json.loads(created) == {"name": "small", "organization": "lab", "visibility": "private"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert greedy(again, AutoTokenizer.from_pretrained(tmp_path / "hub")) == f"{ANSWER}<|end|>"

    with receive("someone/open", tmp_path / "other", public=True) as (address, calls):
        done = run_cli(*words, "--push", "someone/open", env={**env, "HF_ENDPOINT": address})
        assert "note: someone/open existed before and is public" in done.stdout
        done = run_cli(*words, "--push", "someone/open", "--public", env={**env, "HF_ENDPOINT": address})
        assert "note:" not in done.stdout
    assert json.loads([body for path, body in calls if path == "/api/repos/create"][-1])["visibility"] == "public"


@pytest.mark.parametrize("learned", ["qwen2"], indirect=True)
def test_a_push_that_fails_says_what_stays_and_how_to_go_on(
    done_before: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, place = done_before
    env = {**HUB, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_write"}
    for call in ("/commit/", "/lfs/", "/repos/create"):
        with receive("lab/small", tmp_path / "hub", fails=call) as (address, _):
            done = run_cli(*words, "--push", "lab/small", env={**env, "HF_ENDPOINT": address})
        assert done.returncode == 1
        assert "error: lab/small: the push failed (" in done.stderr
        assert f"the export is complete, in {place}" in done.stderr
        assert "Fix: the same command repeats the push alone" in done.stderr
        assert "Traceback" not in done.stderr
        assert list((tmp_path / "hub").iterdir()) == []


@pytest.mark.parametrize("learned", ["qwen2"], indirect=True)
@pytest.mark.parametrize(
    ("repository", "env", "code", "told"),
    [
        ("small", {"HF_TOKEN": "hf_write"}, 2, "got small; expected the name of a repository. Fix: --push OWNER/NAME"),
        ("lab/small", {}, 2, "got no token of the hub; expected one that may write. Fix: hf auth login"),
        ("lab/small", {"HF_TOKEN": "hf_wrong"}, 2, "the hub rejects the token"),
        ("lab/small", {"HF_TOKEN": "hf_read"}, 2, "got a token of someone that may only read"),
        ("else/small", {"HF_TOKEN": "hf_write"}, 2, "expected one that may write to else. Fix: push to someone or lab"),
        ("lab/small", {"HF_TOKEN": "hf_write", "HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
        ("lab/small", {"HF_TOKEN": "hf_write", "HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "the hub cannot be reached"),
    ],
    ids=["no owner", "no token", "unknown", "read", "other", "offline", "unreachable"],
)
def test_a_token_that_may_not_write_is_told_before_anything_is_merged(
    learned: Path, tmp_path: Path, repository: str, env: dict[str, str], code: int, told: str
) -> None:
    words = ["export", "--ckpt", str(learned), "tiny", "--format", "merged16", "--runs", str(tmp_path / "runs")]
    with receive("lab/small", tmp_path / "hub") as (address, calls):
        home = {**HUB, "HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_TOKEN": "", **env}
        done = run_cli(*words, "--push", repository, env=home)
    assert (done.returncode, calls) == (code, [])
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
