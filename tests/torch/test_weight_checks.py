"""A checkpoint is used whole or refused: no code, no pickle, no tensor at random, and one sentence for any damage."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Trainer, TrainingArguments
from trl import GRPOConfig

from pipeline.config.recipe import Lora, Model, RandomInit
from pipeline.core.errors import ArtifactError, PipelineError
from pipeline.engines.engine import Request, Sampling
from pipeline.engines.text import stop_ids
from pipeline.engines.transformers import TransformersEngine
from pipeline.models import weight_checks
from pipeline.models.loading import (
    add_lora,
    check_adapter_alone,
    check_tokenizer,
    load_for_chat,
    load_model,
    load_tokenizer,
    make_random_model,
    merge_adapter,
    prompt_ids,
)
from pipeline.preflight import checks as preflight
from pipeline.training.rollouts import EngineTrainer
from pipeline.workflow.plan import make_plan
from pipeline.workflow.weights import Checkpoint, find_checkpoint

# the suite turns warnings into errors; a user sees neither, so what a library only warns of must be refused here
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]
MODEL = Model("m", None, None, None, None, "none", "auto", "float32")
LORA = Lora(True, 4, 8.0, 0.0, ("all-linear",))
QUESTION = [{"role": "user", "content": "A correlates with B."}]
TEXTS = ["Premise: A correlates with B.\nHypothesis: A directly causes B. <think>\nhm\n</think>\nTherefore: Yes"]
WEIGHTS = "model.safetensors"


def scratch(architecture: str, folder: Path) -> Path:
    heads = 4 if architecture == "phi3" else 2
    make_random_model(
        RandomInit(architecture, 400, 16, 2, 4, heads, 32, 128, 10000.0, 0.3),
        TEXTS * 20,
        "think",
        folder,
        0,
    )
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model that nothing is wrong with."""
    return scratch("qwen2", tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def adapted(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = add_lora(load_model(find_checkpoint(str(sound)), MODEL, dtype=torch.float32), LORA, keep_dtype=False)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


@pytest.fixture
def adapter(adapted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "adapter"))


def edit(file: Path, **changes: Any) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**record, **changes}.items() if value is not ...}))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def use(where: Path, model: Model = MODEL) -> list[int]:
    """Everything that asking a checkpoint does with it; the tokens of a short answer."""
    checkpoint = find_checkpoint(str(where))
    tokenizer = load_tokenizer(checkpoint, model)
    loaded = load_for_chat(checkpoint, model, None)
    check_tokenizer(tokenizer, loaded, checkpoint)
    engine = TransformersEngine(loaded, tokenizer, rows=1)
    [answer] = engine.generate([Request(prompt_ids(tokenizer, [QUESTION])[0])], Sampling(0.0, 1.0, 0, 6))
    return [*tokenizer(answer.completion.text)["input_ids"], answer.completion.tokens]


def refused(where: Path, *told: str, model: Model = MODEL) -> None:
    with pytest.raises(PipelineError) as caught:
        use(where, model)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    for words in told:
        assert words in str(caught.value)


# ---------------------------------------------------------------- any damage is one sentence

DAMAGES: dict[str, Callable[[Path], object]] = {}


def damage_content(file: str, content: bytes | None, folder: Path) -> None:
    """None: the first half of it."""
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2] if content is None else content)


def damage_key(file: str, key: str, value: Any, folder: Path) -> None:
    if key == "chat_template":
        (folder / "chat_template.jinja").unlink()
    edit(folder / file, **{key: value})


CONTENTS = {
    "empty": b"",
    "cut": None,
    "binary": bytes(range(256)) * 4,
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 100_000,
}
for _file in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS):
    for _what, _content in CONTENTS.items():
        DAMAGES[f"{_file} {_what}"] = partial(damage_content, _file, _content)
ROPE = {"rope_type": "default"}
ODD: dict[str, dict[str, list[Any]]] = {
    "config.json": {
        "model_type": ["nothing", 3, None, {}],
        "hidden_size": [0, -16, "16", None, 17, 10**12, 1.5],
        "num_hidden_layers": [0, -1, "2", 1, 3, 10**9],
        "layer_types": ["x", ["nothing", "nothing"], [1, 2]],
        "num_attention_heads": [0, -2, "4", 3, 2, ...],
        "num_key_value_heads": [0, "2", 3, 1],
        "intermediate_size": [0, "x", None, 31],
        "vocab_size": [0, -1, "400", 10, 10**12],
        "max_position_embeddings": [0, -5, "128", None, 1.5],
        "hidden_act": ["nothing", 3],
        "rms_norm_eps": ["x", None, -1e9],
        "rope_parameters": [[], "x", {"rope_type": "nothing"}, {**ROPE, "rope_theta": "x"}, {**ROPE, "rope_theta": 0}],
        "eos_token_id": ["x", {}, [[1]], 10**9],
        "tie_word_embeddings": ["x", False],
        "dtype": ["nothing", 3, []],
        "quantization_config": ["x", {"quant_method": "gptq", "bits": 4}, []],
        "auto_map": [{"AutoConfig": "x.Y"}, "x", 3],
        "transformers_weights": ["nothing.safetensors", 3],
        "architectures": ["x", [3]],
        "fusion_config": ["x", {"nothing": True}],
    },
    "tokenizer_config.json": {
        "tokenizer_class": ["Nothing", 3, None, "PreTrainedTokenizerFast"],
        "eos_token": [3, None, "nothing", {}],
        "pad_token": [3, ["x"]],
        "chat_template": [3, {}, "{{", "{{ 1 / 0 }}", "x", "", "{{ messages[7].content }}", [{"name": "a"}]],
        "auto_map": [{"AutoTokenizer": ["x.Y", None]}, "x"],
        "model_max_length": ["x", -1],
        "added_tokens_decoder": ["x", {"1": "x"}],
        "extra_special_tokens": ["x"],
    },
}
for _file, _keys in ODD.items():
    for _key, _values in _keys.items():
        for _value in _values:
            DAMAGES[f"{_file} {_key}={_value!r}"] = partial(damage_key, _file, _key, _value)


def test_any_damage_to_a_model_is_one_sentence(sound: Path, tmp_path: Path) -> None:
    """A damaged folder is refused by a PipelineError of one sentence, or it answers as the sound model does."""
    wanted, problems, refusals = use(sound), [], 0
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = Path(shutil.copytree(sound, tmp_path / str(number)))
        damage(folder)
        try:
            if (found := use(folder)) != wanted:
                problems.append(f"{name}: answers {found}")
        except PipelineError as error:
            refusals += 1
            if len(error.problems) != 1 or "\n" in str(error):
                problems.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not problems, "\n".join(problems)
    assert refusals > 0.8 * len(DAMAGES)


def test_any_damage_to_a_model_is_found_while_planning(sound: Path, tmp_path: Path) -> None:
    """The planner reads the same files without transformers: it plans, or stops with one sentence."""
    words = [f"model.name={sound}", "model.revision=null", "cluster.gpus=1", "cluster.gpu_memory=40"]
    plan, problems = make_plan(["qwen1.5b"], words, runs=tmp_path), []
    for number, (name, damage) in enumerate(DAMAGES.items()):
        if not name.startswith(("config.json", "tokenizer.json")):
            continue
        folder = Path(shutil.copytree(sound, tmp_path / str(number)))
        damage(folder)
        recipe = plan.steps[0].recipe
        recipe = replace(recipe, model=replace(recipe.model, name=str(folder)))
        damaged = replace(plan, steps=tuple(replace(step, recipe=recipe) for step in plan.steps))
        try:
            preflight.problems(damaged)
        except PipelineError as error:
            if "\n" in str(error):
                problems.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)


def test_a_billion_layers_are_refused_before_memory_is_filled(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=10**9, layer_types=...)
    refused(copy, "num_hidden_layers: got 1000000000; expected at most", str(copy))


ODD_ADAPTERS: dict[str, list[Any]] = {
    "peft_type": ["nothing", 3, None, "PROMPT_TUNING"],
    "r": [0, -1, "x", 8, None],
    "lora_alpha": ["x", None],
    "target_modules": ["nothing", ["nothing"], 3, None, [], ["q_proj"]],
    "base_model_name_or_path": ["", 3, None, "no/such/folder", "x" * 5000, "a\0b", "/proc"],
    "task_type": ["nothing"],
    "rank_pattern": ["x", {"q_proj": 7}],
    "use_dora": [True],
    "bias": ["nothing", "all"],
    "megatron_config": [{"a": 1}],
    "layers_to_transform": [[0]],
    "modules_to_save": [["lm_head"], "x"],
}
BROKEN_ADAPTERS: dict[str, Callable[[Path], object]] = {
    **{f"config {what}": partial(damage_content, "adapter_config.json", content) for what, content in CONTENTS.items()},
    **{
        f"weights {what}": partial(damage_content, "adapter_model.safetensors", content)
        for what, content in CONTENTS.items()
    },
    **{
        f"{key}={value!r}": partial(damage_key, "adapter_config.json", key, value)
        for key, values in ODD_ADAPTERS.items()
        for value in values
    },
}


def test_any_damage_to_an_adapter_is_one_sentence(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted, problems = use(adapted), []
    for number, (name, damage) in enumerate(BROKEN_ADAPTERS.items()):
        folder = Path(shutil.copytree(adapted, tmp_path / str(number)))
        damage(folder)
        try:
            if (found := use(folder)) != wanted:
                problems.append(f"{name}: answers {found}")
        except PipelineError as error:
            if len(error.problems) != 1 or "\n" in str(error) or str(folder) not in str(error):
                problems.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)


def test_an_adapter_on_itself_or_in_a_circle_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    edit(other / "adapter_config.json", base_model_name_or_path=str(adapter))
    for one in (adapter, other):
        with pytest.raises(ArtifactError, match="an adapter itself; expected a whole model"):
            find_checkpoint(str(one))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(ArtifactError, match="an adapter itself"):
        find_checkpoint(str(adapter))


# ---------------------------------------------------------------- no code and no pickle of others


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a checkpoint would make; whoever is asked says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return tmp_path / "marker"


def test_the_python_of_a_checkpoint_never_runs(
    copy: Path, adapter: Path, sound: Path, marker: Path, tmp_path: Path
) -> None:
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import Qwen2Config as C, Qwen2ForCausalLM as M"
    (copy / "theirs.py").write_text(f"{code}\nfrom transformers import PreTrainedTokenizerFast as T\n")
    auto = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    edit(copy / "config.json", model_type="theirs", auto_map=auto)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    for where in (copy, adapter):
        checkpoint = find_checkpoint(str(where))
        ways: list[Callable[[], object]] = [
            lambda: load_model(checkpoint, MODEL, dtype=torch.float32),  # noqa: B023
            lambda: load_for_chat(checkpoint, MODEL, None),  # noqa: B023
            lambda: merge_adapter(checkpoint, MODEL, torch.float32),  # noqa: B023
        ]
        if checkpoint.adapter:
            ways.append(lambda: check_adapter_alone(checkpoint, MODEL))  # noqa: B023
        for way in ways:
            with pytest.raises(ArtifactError, match=r"Python code of their own \(auto_map\), which never runs here"):
                way()
    load_tokenizer(find_checkpoint(str(copy)), MODEL)
    assert not marker.exists()
    shutil.copy(sound / "config.json", copy)
    edit(copy / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "theirs.T"]})
    edit(copy / "config.json", auto_map=auto)  # of a kind that transformers knows: its own code is used
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(f"{code}\ndef generate(model, **_): return 1 / 0\n")
    assert use(copy) == use(sound)
    assert not marker.exists()


def test_every_call_that_loads_says_that_no_code_runs() -> None:
    found, silent = 0, []
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in ("from_pretrained", "from_config") or owner in ("PeftModel", "PeftConfig"):
                continue
            found += 1
            starred = {ast.unparse(word.value) for word in node.keywords if word.arg is None}
            if not starred & {"NO_CODE", "NO_PICKLE"}:
                silent.append(f"{path.name}:{node.lineno}")
    assert found >= 12
    assert silent == []


class Malicious:
    """What makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_no_pickle_of_others_runs(copy: Path, adapter: Path, sound: Path, adapted: Path, marker: Path) -> None:
    tensors, added = load_file(copy / WEIGHTS), load_file(adapter / "adapter_model.safetensors")
    (copy / WEIGHTS).unlink()
    (adapter / "adapter_model.safetensors").unlink()
    for payload in (pickle.dumps(Malicious(marker)), None):
        for file in (copy / "pytorch_model.bin", adapter / "adapter_model.bin"):
            if payload:
                file.write_bytes(payload)
            else:
                torch.save({"x": Malicious(marker)}, file)
            refused(file.parent, "no pickle runs here")
    (copy / "training_args.bin").write_bytes(pickle.dumps(Malicious(marker)))
    torch.save(tensors, copy / "pytorch_model.bin")  # a file of tensors alone is read
    torch.save(added, adapter / "adapter_model.bin")
    assert use(copy) == use(sound)
    assert use(adapter) == use(adapted)
    torch.save({**tensors, "model.norm.weight": tensors["model.norm.weight"] / 0}, copy / "pytorch_model.bin")
    refused(copy, "values of model.norm.weight are NaN or infinite")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_trainer_that_resumes_runs_no_pickle(copy: Path, marker: Path, tmp_path: Path, name: str) -> None:
    """What a Trainer checkpoint holds beside the weights; DeepSpeed's own states are another matter."""
    model = load_model(find_checkpoint(str(copy)), MODEL, dtype=torch.float32)
    settings = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, save_steps=1, max_steps=1)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    Trainer(model, settings, train_dataset=rows).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    if name == "pytorch_model.bin":
        (checkpoint / WEIGHTS).unlink()
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Malicious(marker)))
    (checkpoint / name).write_bytes(pickle.dumps(Malicious(marker)))
    again = Trainer(model, replace(settings, max_steps=2), train_dataset=rows)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()


# ---------------------------------------------------------------- every tensor fits


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_sound_models_are_no_false_alarm(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Tied and untied, in one file and in shards, with keys of old versions, quantized while loading and before."""
    folder = scratch(architecture, tmp_path / "model")
    if not tied:
        edit(folder / "config.json", tie_word_embeddings=False)
        rewrite(folder / WEIGHTS, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    rewrite(folder / WEIGHTS, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    wanted = use(folder)
    model = load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path / "shards")
    shutil.copy(folder / "chat_template.jinja", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert use(tmp_path / "shards") == wanted
    for kind in ("nf4", "int8"):
        packed = load_model(find_checkpoint(str(folder)), replace(MODEL, quantization=kind), dtype=torch.float32)
        packed.save_pretrained(tmp_path / kind)
        load_model(find_checkpoint(str(tmp_path / kind)), MODEL, dtype=torch.float32)
    half = merge_adapter(find_checkpoint(str(folder)), MODEL, torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    load_model(find_checkpoint(str(tmp_path / "half")), MODEL, dtype=torch.bfloat16)


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tensors_that_do_not_fit_are_named(copy: Path, sound: Path, quantization: str) -> None:
    model = replace(MODEL, quantization=quantization)  # type: ignore[arg-type]
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], object], tuple[str, ...]]] = [
        (lambda t: t.pop(GATE), ("lacks 1 of the model's tensors", GATE)),
        (lambda t: t.update({"other.weight": t[NORM].clone()}), ("has 1 tensors that are not in the model", "other")),
        (
            lambda t: t.update({f"{GATE}s": t.pop(GATE)}),
            ("lacks 1", "has 1 tensors that are not in the model", f"{GATE}s"),
        ),
        (lambda t: t.update({GATE: t[GATE][:-2].clone()}), ("other shapes", f"{GATE} (30, 16), expected (32, 16)")),
        (lambda t: t[GATE].view(-1)[7:9].fill_(float("nan")), (f"2 of 512 values of {GATE} are NaN or infinite",)),
        (lambda t: t[NORM].view(-1)[3:4].fill_(float("-inf")), (f"1 of 16 values of {NORM} are NaN or infinite",)),
        (lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)], ("lacks 27 of the model's", "and 23 more")),
    ]
    for change, told in cases:
        shutil.copy(sound / WEIGHTS, copy)
        rewrite(copy / WEIGHTS, change)
        refused(copy, str(copy), *told, model=model)
    for kind in (torch.float16, torch.float32):
        with pytest.raises(ArtifactError) if kind == torch.float16 else contextlib.nullcontext():
            shutil.copy(sound / WEIGHTS, copy)
            rewrite(copy / WEIGHTS, lambda t: t[NORM].view(-1)[:1].fill_(1e5))
            load_model(find_checkpoint(str(copy)), MODEL, dtype=kind)


def test_under_zero3_unexpected_tensors_are_found_in_the_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes them for expected there; that sound weights pass is shown by every run with ZeRO-3."""
    model = load_model(find_checkpoint(str(copy)), MODEL, dtype=torch.float32)
    monkeypatch.setattr(weight_checks, "is_deepspeed_zero3_enabled", lambda: True)
    rewrite(copy / WEIGHTS, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    weight_checks.check_keys(model, {}, str(copy), None)
    rewrite(copy / WEIGHTS, lambda t: t.update({"model.layers.2.mlp.gate_proj.weight": t[GATE].clone()}))
    with pytest.raises(ArtifactError, match=r"has 1 tensors that are not in the model \(model.layers.2.mlp.gate_proj"):
        weight_checks.check_keys(model, {}, str(copy), None)


def test_a_missing_shard_is_named(sound: Path, tmp_path: Path) -> None:
    load_model(find_checkpoint(str(sound)), MODEL, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="8KB")
    for file in sound.glob("*token*"):
        shutil.copy(file, tmp_path)
    shutil.copy(sound / "chat_template.jinja", tmp_path)
    assert use(tmp_path) == use(sound)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path, gone.name)


def test_a_model_with_an_adapter_inside_it_is_refused(copy: Path, adapted: Path) -> None:
    """transformers would put it on unasked, as it does for an adapter on the hub, and an export would lose it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapted / name, copy)
    whole = Checkpoint(str(copy), None, str(copy))
    for way in (load_model, merge_adapter):
        with pytest.raises(ArtifactError, match="an adapter; expected a whole model"):
            way(whole, MODEL, dtype=torch.float32)


Q, K = (f"base_model.model.model.layers.1.self_attn.{name}_proj.lora_A.weight" for name in "qk")


def test_adapter_tensors_that_do_not_fit_are_named(adapter: Path, adapted: Path, sound: Path) -> None:
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], object], tuple[str, ...]]] = [
        (lambda t: t.pop(Q), ("1 tensors of its modules are missing", Q)),
        (lambda t: t.update({f"{Q}s": t[K].clone()}), ("1 of its 29 tensors fit no module", f"{Q}s")),
        (lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)], ("28 of its 28 tensors fit no module",)),
        (lambda t: t.update({Q: t[Q][:2].clone()}), ("its tensors have rank 2", "has r=4")),
        (lambda t: t.update({Q: t[Q][:, :8].clone()}), ("size mismatch for", "[4, 8]", "[4, 16]")),
        (lambda t: t[K].view(-1)[:3].fill_(float("inf")), (f"3 of 64 values of {K} are NaN or infinite",)),
        (lambda t: t.clear(), ("its file holds no tensors",)),
    ]
    for change, told in cases:
        shutil.copy(adapted / "adapter_model.safetensors", adapter)
        rewrite(adapter / "adapter_model.safetensors", change)
        checkpoint = find_checkpoint(str(adapter))
        for way in (load_model, merge_adapter):  # to ask, to train, and to export
            with pytest.raises(ArtifactError) as caught:
                way(checkpoint, MODEL, dtype=torch.float32)
            assert all(words in str(caught.value) for words in (str(adapter), *told)), str(caught.value)
        with pytest.raises(ArtifactError):
            check_adapter_alone(checkpoint, MODEL)
    shutil.copy(adapted / "adapter_model.safetensors", adapter)
    check_adapter_alone(find_checkpoint(str(adapter)), MODEL)


def test_adapters_of_other_shapes_are_no_false_alarm(sound: Path, tmp_path: Path) -> None:
    """A trained head beside the adapter, a resized embedding, ranks by module, DoRA."""
    for number, settings in enumerate(
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}, "use_dora": True},
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            {"target_modules": ["q_proj"], "bias": "lora_only"},
        )
    ):
        base = load_model(find_checkpoint(str(sound)), MODEL, dtype=torch.float32)
        folder = tmp_path / str(number)
        get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).save_pretrained(folder)  # type: ignore[arg-type]
        checkpoint = find_checkpoint(str(folder))
        assert isinstance(load_model(checkpoint, MODEL, dtype=torch.float32), PeftModel)
        check_adapter_alone(checkpoint, MODEL)
        merge_adapter(checkpoint, MODEL, torch.float32)


# ---------------------------------------------------------------- tokenizer and chat template


def test_a_tokenizer_that_cannot_read_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()  # transformers makes one of the special tokens alone: every prompt is empty
    refused(copy, f"tokenizer {copy}: cannot read a plain sentence", "decodes to")


def test_a_tokenizer_that_has_lost_its_words_is_refused(copy: Path) -> None:
    record = json.loads((copy / "tokenizer.json").read_text())
    record["model"]["vocab"] = {k: v for k, v in record["model"]["vocab"].items() if k != "P"}
    record["model"]["merges"] = []
    (copy / "tokenizer.json").write_text(json.dumps(record))
    refused(copy, "cannot read a plain sentence")


LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
ENDLESS = {
    "loops": LOOP + "{{ messages[0].content }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "memory": "{{ 'x' * 10 ** 11 }}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "text": "{{ messages[0].content }}{{ 'x' * 10 ** 7 }}",
    "later": "{% if messages | length > 2 %}" + LOOP + "{% endif %}{{ messages[-1].content }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_refused_in_bounded_time(name: str, copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(ENDLESS[name])
    refused(copy, f"tokenizer {copy}: the chat template ")
    mine = copy.parent / "mine.jinja"
    mine.write_text(ENDLESS["text"])
    if name == "text":
        with pytest.raises(ArtifactError, match=rf"{mine}: the chat template writes 10,000,013 characters"):
            load_tokenizer(Checkpoint(str(copy), None, str(copy)), replace(MODEL, chat_template=str(mine)))


# ---------------------------------------------------------------- the call's own settings alone count

STRANGE: dict[str, Any] = {
    "max_length": 3,
    "max_new_tokens": 1,
    "min_length": 30,
    "min_new_tokens": 9,
    "early_stopping": True,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "do_sample": True,
    "num_beams": 4,
    "use_cache": False,
    "cache_implementation": "quantized",
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "length_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[5], [6], [7]],
    "renormalize_logits": True,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 99.0],
    "suppress_tokens": list(range(20, 300)),
    "begin_suppress_tokens": list(range(20, 300)),
    "sequence_bias": [[[33], 99.0]],
    "token_healing": True,
    "guidance_scale": 9.0,
    "watermarking_config": {"bias": 9.0},
    "num_return_sequences": 4,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 7,
    "bos_token_id": 7,
    "eos_token_id": 40,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 2,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "penalty_alpha": 0.9,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "diversity_penalty": 1.0,
    "constraints": [1],
    "force_words_ids": [[5]],
    "low_memory": True,
    "prefill_chunk_size": 1,
    "compile_config": {"mode": "nothing"},
    "disable_compile": False,
    "custom_thing": 3,
    "transformers_version": "x",
    "cache_config": {"nbits": 1},
    "max_cache_len": 1,
    "continuous_batching_config": {},
    "encoder_no_repeat_ngram_size": 1,
    "speculation_type": "nothing",
    "use_mtp": True,
    "assistant_confidence_threshold": 0.9,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "num_assistant_tokens_schedule": "constant",
}


def test_no_setting_of_the_checkpoint_changes_an_answer(copy: Path, sound: Path) -> None:
    """Each field of a generation config set to an odd value, in the file and on the model that is asked."""
    checkpoint = find_checkpoint(str(copy))
    tokenizer = load_tokenizer(checkpoint, MODEL)
    prompts = prompt_ids(tokenizer, [QUESTION, [{"role": "user", "content": "Premise"}]])

    def answers(model: Any) -> list[Any]:
        engine = TransformersEngine(model, tokenizer, rows=2)
        asked = [Request(prompt) for prompt in prompts]
        found = [engine.generate(asked, Sampling(*how, 8)) for how in ((0.0, 1.0, 0), (1.0, 0.9, 20))]
        return [one.completion for answers in found for one in sorted(answers, key=lambda one: one.request)]

    model = load_for_chat(checkpoint, MODEL, None)
    wanted = answers(model)
    assert len(wanted) == 4
    assert len({one.text for one in wanted}) > 1
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert known <= set(STRANGE), known - set(STRANGE)
    changed = []
    for key, value in {**STRANGE, "everything": None}.items():
        odd = STRANGE if key == "everything" else {key: value}
        (copy / "generation_config.json").write_text(json.dumps(odd))
        model.generation_config = GenerationConfig()
        for name, setting in odd.items():
            setattr(model.generation_config, name, setting)
        if answers(model) != wanted:
            changed.append(f"{key} on the model")
        if key in ("everything", "num_beams", "eos_token_id", "watermarking_config", "max_time"):
            other = load_for_chat(checkpoint, MODEL, None)
            if answers(other) != wanted:
                changed.append(f"{key} in the file")
            # GRPO's own settings are filled from this: nothing of the file is left in it
            assert {k for k, v in other.generation_config.to_diff_dict().items() if v is not None} <= {
                "eos_token_id",
                "transformers_version",
            }
    assert changed == []
    (copy / "generation_config.json").write_text("[" * 100_000)
    assert answers(load_for_chat(checkpoint, MODEL, None)) == wanted


def rollouts(folder: Path, out: Path) -> list[list[int]]:
    """The tokens that one step of GRPO draws, its trainer made as the stage makes it."""
    checkpoint = find_checkpoint(str(folder))
    tokenizer, drawn = load_tokenizer(checkpoint, MODEL), []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        drawn.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    model = load_model(checkpoint, MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    settings = GRPOConfig(
        str(out),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    rows = Dataset.from_list([{"prompt": QUESTION}] * 4)
    trainer = EngineTrainer(model, reward_funcs=reward, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.engine, trainer.sampling = TransformersEngine(model, tokenizer, rows=4), Sampling(1.0, 1.0, 0, 8)
    trainer.train()
    return drawn


def test_no_setting_of_the_checkpoint_changes_a_rollout(copy: Path, sound: Path, tmp_path: Path) -> None:
    wanted = rollouts(sound, tmp_path / "wanted")
    assert len(wanted) == 4
    edit(copy / "config.json", repetition_penalty=9.0, num_beams=2)  # where old checkpoints have them
    (copy / "generation_config.json").write_text(json.dumps(STRANGE))
    assert rollouts(copy, tmp_path / "found") == wanted


def test_the_special_tokens_that_a_checkpoint_stops_at_are_kept(copy: Path) -> None:
    checkpoint = find_checkpoint(str(copy))
    tokenizer = load_tokenizer(checkpoint, MODEL)
    other = tokenizer.convert_tokens_to_ids("<|user|>")
    word = tokenizer("A", add_special_tokens=False)["input_ids"][0]
    edit(copy / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, other, word, 10**9, "x", None])
    model = load_for_chat(checkpoint, MODEL, None)
    assert stop_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, other])
