"""Rows in one line, and prompts that completions share: the losses and gradients of padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from recipes import cluster_of, recipe_of
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from pipeline.config.architectures import ARCHITECTURES
from pipeline.config.recipe import RandomInit
from pipeline.models.attention import is_plain
from pipeline.models.loading import make_random_model, nf4_config
from pipeline.sizing.memory import shares_prompts
from pipeline.training.flat import Flat, collate, of_groups, replace_attention
from pipeline.training.rollouts import EngineTrainer, _in_groups
from pipeline.workflow.progress import ProgressFile
from pipeline.workflow.runtime import Runtime

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS: dict[str, dict[str, Any]] = {  # layers that see a few tokens back, as those of Gemma 3 and Phi-3 do
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 6},
}
KINDS = sorted(ARCHITECTURES)
GROUPS = [([5, 6, 7, 8, 9, 10, 11, 12], [[30, 31, 32], [33], [35, 36, 37, 38]]), ([20], [[40, 41], []])]


def make_model(kind: str, way: str, folder: Path, *, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **WINDOWS.get(kind, {}))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if way == "nf4":
        model.save_pretrained(folder)
        quantized = nf4_config(torch.float32)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if way != "full":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, weights in model.named_parameters():
            if "lora_B" in name:  # at zero, nothing would come to lora_A
                torch.nn.init.normal_(weights, std=0.1)
    return model.train()


def batch_of(groups: list[tuple[list[int], list[list[int]]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """TRL's batch: prompts padded on the left, completions on the right."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    width, scored = max(len(prompt) for prompt, _ in rows), max(max(len(c) for _, c in rows), 1)
    ids = [[0] * (width - len(p)) + p + c + [0] * (scored - len(c)) for p, c in rows]
    seen = [[0] * (width - len(p)) + [1] * (len(p) + len(c)) + [0] * (scored - len(c)) for p, c in rows]
    return torch.tensor(ids), torch.tensor(seen), scored


def padded_scores(model: Any, ids: torch.Tensor, mask: torch.Tensor, scored: int) -> torch.Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-scored] = -100
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    return found[:, -scored:]


def flat_scores(model: Any, ids: torch.Tensor, mask: torch.Tensor, scored: int) -> torch.Tensor:
    flat, inputs = of_groups(ids, mask, scored)
    found = model(**inputs, fused_lm_head=True).log_probs[0][flat.own]
    return torch.nn.functional.pad(found, (0, scored - found.shape[1])).masked_fill(mask[:, -scored:] == 0, 0)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.grad is not None}


def runtime_of(folder: Path, *words: str) -> Runtime:
    return Runtime(cluster_of("local", *words), ProgressFile(None, "sft"), 0, 1, folder, None, None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["full", "lora", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_computed_once_gives_the_same_scores_and_gradients(
    kind: str, way: str, checkpointing: bool, tmp_path: Path
) -> None:
    model = make_model(kind, way, tmp_path, checkpointing=checkpointing)
    ids, mask, scored = batch_of(GROUPS)
    weights = torch.rand(len(ids), scored)
    before = padded_scores(model, ids, mask, scored)
    wished = gradients(model, (before * weights).sum())
    assert replace_attention(runtime_of(tmp_path), model, saves=True)
    after = flat_scores(model, ids, mask, scored)
    assert torch.allclose(before, after, atol=3e-6)
    found = gradients(model, (after * weights).sum())
    assert found.keys() == wished.keys()
    for name, gradient in wished.items():
        assert (gradient - found[name]).abs().max() <= 2e-5 * max(gradient.abs().max().item(), 1e-2), name


def test_a_prompt_is_read_once(tmp_path: Path) -> None:
    model = make_model("qwen2", "full", tmp_path, checkpointing=False)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, tokens, __: seen.append(tokens[0].numel()))
    ids, mask, scored = batch_of(GROUPS)
    assert replace_attention(runtime_of(tmp_path), model, saves=True)
    flat_scores(model, ids, mask, scored)
    assert seen == [7 + (3 + 1 + 4) + 0 + (2 + 1)]  # each prompt but for its last token, which leads each completion


Groups = st.lists(
    st.tuples(
        st.lists(st.integers(3, 95), min_size=1, max_size=9),
        st.lists(st.lists(st.integers(3, 95), max_size=6), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same weights twice: padded, and flat."""
    folder = tmp_path_factory.mktemp("pair")
    models = [make_model("gemma3_text", "full", folder, checkpointing=False) for _ in range(2)]
    assert replace_attention(runtime_of(folder), models[1], saves=True)
    return models[0], models[1]


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_attended_block_by_block(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind, "full", tmp_path, checkpointing=False)
    batch = batch_of(GROUPS)
    before = padded_scores(model, *batch)
    wished = gradients(model, before.sum())
    monkeypatch.setattr("pipeline.training.flat.BLOCK", 2)
    assert replace_attention(runtime_of(tmp_path), model, saves=True)
    after = flat_scores(model, *batch)
    assert torch.allclose(before, after, atol=3e-6)
    found = gradients(model, after.sum())
    assert all(torch.allclose(wished[name], found[name], atol=1e-5) for name in wished)


@given(Groups)
@settings(max_examples=60, deadline=None)
def test_groups_of_any_lengths_have_the_scores_of_a_padded_batch(
    pair: tuple[Any, Any], groups: list[tuple[list[int], list[list[int]]]]
) -> None:
    batch = batch_of(groups)
    with torch.no_grad():
        assert torch.allclose(padded_scores(pair[0], *batch), flat_scores(pair[1], *batch), atol=5e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_in_one_line_have_the_loss_of_padded_rows(pair: tuple[Any, Any], lengths: list[int], packed: bool) -> None:
    texts = [[3 + (7 * n + k) % 90 for k in range(length)] for n, length in enumerate(lengths)]
    labels = [[-100 if k < len(text) // 2 else token for k, token in enumerate(text)] for text in texts]
    width = max(lengths)
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    rows: list[dict[str, Any]] = [{"input_ids": t, "labels": row} for t, row in zip(texts, labels, strict=True)]
    if packed:
        joined = {name: [one for row in rows for one in row[name]] for name in ("input_ids", "labels")}
        rows = [{**joined, "seq_lengths": lengths}]
    batch = collate(rows)
    assert batch.pop("lengths").tolist() == ([sum(lengths)] if packed else lengths)
    with torch.no_grad():
        before = pair[0](input_ids=ids, attention_mask=mask, labels=padded, fused_lm_head=True)
        after = pair[1](**batch, fused_lm_head=True)
    assert after.label_mask.sum() == before.label_mask.sum() == batch["shift_labels"].ne(-100).sum()
    assert torch.allclose(before.log_probs.sum(), after.log_probs.sum(), atol=5e-5)


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},  # its scores have a soft cap
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},  # it attends to sinks, too
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8},  # a state leads from token to token
    "llama4_text": {},  # chunks
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_replaced_is_padded(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, **SMALL, **OTHERS[kind])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert not is_plain(model)
    assert not replace_attention(runtime_of(tmp_path), model, saves=True)
    runtime = runtime_of(tmp_path, "padding_free=true")
    assert not replace_attention(runtime, model, saves=True)
    assert model.config._attn_implementation == "eager"
    assert "cannot be replaced" in runtime.progress.now.warnings[0]


@pytest.mark.parametrize(
    ("word", "saves", "found"),
    [("auto", True, True), ("auto", False, False), ("false", True, False), ("true", False, True)],
)
def test_the_setting_decides(word: str, saves: bool, found: bool, tmp_path: Path) -> None:
    model = make_model("qwen2", "full", tmp_path, checkpointing=False)
    assert replace_attention(runtime_of(tmp_path, f"padding_free={word}"), model, saves=saves) == found
    assert (model.config._attn_implementation != "sdpa") == found


def test_the_planner_shares_prompts_where_that_saves_tokens() -> None:
    recipe, cluster = recipe_of("qwen1.5b"), cluster_of("local")
    assert shares_prompts(recipe, cluster, 8)
    assert not shares_prompts(recipe, cluster, 1)  # each row has a prompt of its own
    short = recipe_of("qwen1.5b", "grpo.max_prompt_length=64", "grpo.max_completion_length=2048")
    assert not shares_prompts(short, cluster, 8)
    assert shares_prompts(short, cluster_of("local", "padding_free=true"), 8)
    assert not shares_prompts(recipe, cluster_of("local", "padding_free=false"), 8)


def test_positions_begin_anew_behind_each_prompt() -> None:
    flat = Flat([2, 3, 1], [4, 0], [0, 0, 1])
    assert flat.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0]
    assert Flat([2, 3]).positions.tolist() == [0, 1, 0, 1, 2]


# ---------------------------------------------------------------- completions without a gradient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch")
    scratch = RandomInit("qwen2", 400, 32, 1, 4, 2, 32, 128, 10000.0, 0.02)
    make_random_model(scratch, ["Premise: A correlates with B. Hypothesis: A causes B."] * 50, "think", out, 0)
    return out


def trainer_of(kind: type[GRPOTrainer], folder: Path, loss_type: str) -> Any:
    config = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        loss_type=loss_type,
        num_generations=2,
        per_device_train_batch_size=4,
        steps_per_generation=1,
        model_init_kwargs={"dtype": "float32"},
    )
    rows = Dataset.from_list([{"prompt": "Premise"}] * 4)
    trainer = kind(
        str(folder), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=rows
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rollouts(advantages: list[float], *, old: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    ids, mask, scored = batch_of([([5, 6, 7, 8], [[30, 31, 32], [33]]), ([20, 21], [[40, 41], [42, 43, 44]])])
    more = {"old_per_token_logps": -6 + torch.rand(4, scored)} if old else {}
    return {
        "prompt_ids": ids[:, :-scored],
        "prompt_mask": mask[:, :-scored],
        "completion_ids": ids[:, -scored:],
        "completion_mask": mask[:, -scored:],
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": mask[:, -scored:].sum(),
        **more,
    }


@pytest.mark.parametrize("advantages", [[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, -0.5, 1.0, -1.0]])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("flat", [False, True])
def test_completions_without_a_gradient_are_not_computed_and_nothing_else_changes(
    folder: Path, loss_type: str, old: bool, advantages: list[float], flat: bool
) -> None:
    plain, ours = trainer_of(GRPOTrainer, folder, loss_type), trainer_of(EngineTrainer, folder, loss_type)
    ours.flat = flat and replace_attention(runtime_of(folder), ours.model, saves=True)
    batch = rollouts(advantages, old=old)
    loss = plain._compute_loss(plain.model, batch)
    wished = gradients(plain.model, loss)
    read: list[int] = []
    ours.model.get_input_embeddings().register_forward_hook(lambda _, tokens, __: read.append(tokens[0].numel()))
    mine = ours._compute_loss(ours.model, batch)
    assert torch.allclose(loss, mine, atol=1e-6)
    found = gradients(ours.model, mine)
    assert all(torch.allclose(wished[name], found[name], atol=1e-6) for name in wished)
    useful = sum(one != 0 for one in advantages)
    width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    lines = {0: 1, 2: 3 + 3 + 1, 4: 3 + 3 + 1 + 1 + 2 + 3}  # of prompts but for their last token, and of completions
    assert read == [lines[useful] if flat else 2 if not useful else useful * width]
    entropies = [trainer._metrics["train"]["entropy"] for trainer in (plain, ours)]
    assert not entropies[1] if not useful else useful < 4 or entropies[0] == pytest.approx(entropies[1])


def test_rows_of_a_prompt_stand_together_and_those_without_a_gradient_last() -> None:
    prompts = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [5, 6]])
    rows = {
        "prompt_ids": prompts,
        "advantages": torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0, -1.0]),
        "total": torch.tensor(6),
    }
    found = _in_groups(rows, rows["advantages"] != 0)
    assert found["prompt_ids"][:, 0].tolist() == [3, 3, 5, 5, 1, 1]
    assert found["advantages"].tolist() == [1.0, -1.0, 1.0, -1.0, 0.0, 0.0]
    assert found["total"] == 6
