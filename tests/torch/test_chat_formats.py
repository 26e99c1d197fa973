"""The families' chat formats, token by token, with the templates they really have.

The tokenizers are stand-ins with each family's special tokens; the templates are those that TRL ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.config.model_files import FAMILIES, TEMPLATES, TRL
from pipeline.config.recipe import Model
from pipeline.core.errors import RecipeError
from pipeline.models.loading import encode_rows, load_tokenizer, prompt_ids, template_opens_think
from pipeline.models.loading import train_tokenizer as train
from pipeline.workflow.weights import Checkpoint

PROMPT = [{"role": "user", "content": "Does A cause B?"}]
THOUGHT = "<think>\nA B linked.\n</think>\n\nTherefore: No"


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer has, and what its texts are."""

    special: tuple[str, ...]
    bos: str | None
    eos: str  # as its own tokenizer has it
    pad: str | None
    prompt: str  # up to where the model begins to write
    stop: str  # what ends its turn
    prompt_opens_think: bool = False
    lead: str = ""  # what the model writes before its words


FORMATS = {
    "deepseek_r1_distill": Family(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|fim_pad|>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Does A cause B?<｜Assistant｜><think>\n",
        "<｜end▁of▁sentence｜>",
        prompt_opens_think=True,
    ),
    "phi3_5": Family(
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        "<|user|>\nDoes A cause B?<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "qwen2_5": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nDoes A cause B?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>user\nDoes A cause B?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "gemma3": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<pad>",
        "<bos><start_of_turn>user\nDoes A cause B?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "llama3": Family(
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        None,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDoes A cause B?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "chatml": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>user\nDoes A cause B?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "instruction": Family(  # Alpaca's text on Llama's tokens, as the recipe human_like has it
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        None,
        "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nDoes A cause B?\n\n### Response:\n",
        "<|end_of_text|>",
    ),
    "plain": Family(
        ("<|endoftext|>", "<|fim_pad|>"), None, "<|endoftext|>", None, "Does A cause B?", "<|endoftext|>", lead=" "
    ),
}


def stand_in(family: Family) -> PreTrainedTokenizerBase:
    tokenizer = train(["Does A cause B? A B linked. Therefore: No You are a helpful assistant"] * 20, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = family.bos, family.eos, family.pad
    return tokenizer


@pytest.fixture(params=list(FORMATS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedTokenizerBase, Family]:
    """A family's tokenizer as the pipeline loads it, and what is expected of it."""
    stand_in(FORMATS[request.param]).save_pretrained(tmp_path)
    model = Model("m", None, None, None, request.param, "none", "auto", "float32")
    return load_tokenizer(Checkpoint(str(tmp_path), None, str(tmp_path)), model), FORMATS[request.param]


def test_every_family_has_a_case() -> None:
    assert set(FORMATS) == set(TEMPLATES) - {"think"}  # which every run of tiny tries
    assert all(path.is_file() for path in TEMPLATES.values())


def test_the_prompt_is_the_familys_own(case: tuple[PreTrainedTokenizerBase, Family]) -> None:
    tokenizer, family = case
    ids = prompt_ids(tokenizer, [PROMPT])[0]
    assert tokenizer.decode(ids) == family.prompt
    assert ids == tokenizer(family.prompt, add_special_tokens=False)["input_ids"]  # no second bos
    assert template_opens_think(tokenizer) == family.prompt_opens_think
    for special in family.special:
        if special in family.prompt:
            assert tokenizer.convert_tokens_to_ids(special) in ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_the_stock_template_generates_from(name: str) -> None:
    tokenizer = stand_in(FORMATS[name])
    tokenizer.chat_template = (TRL / f"{name}.jinja").read_text()
    stock = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False)
    assert stock == FORMATS[name].prompt


def test_the_thought_is_kept_and_the_loss_falls_on_it_and_on_the_stop(
    case: tuple[PreTrainedTokenizerBase, Family],
) -> None:
    tokenizer, family = case
    row = encode_rows(tokenizer, [PROMPT], [[{"role": "assistant", "content": THOUGHT}]])[0]
    learned = [token for token in row["labels"] if token != -100]
    written = family.lead + (THOUGHT.removeprefix("<think>\n") if family.prompt_opens_think else THOUGHT)
    assert tokenizer.decode(learned) == written + family.stop
    assert tokenizer.decode(row["input_ids"]) == family.prompt + written + family.stop
    assert row["labels"].index(learned[0]) == len(prompt_ids(tokenizer, [PROMPT])[0])


def test_the_stop_token_ends_a_turn_and_is_not_the_pad(case: tuple[PreTrainedTokenizerBase, Family]) -> None:
    tokenizer, family = case
    assert tokenizer.eos_token == family.stop
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_the_stock_template_of_r1_would_delete_the_thought() -> None:
    """Why a recipe names the family's template instead of taking the tokenizer's own."""
    tokenizer = stand_in(FORMATS["deepseek_r1_distill"])
    tokenizer.chat_template = (TRL / "deepseek_r1_distill.jinja").read_text()
    with pytest.raises(RecipeError, match="the generation prompt is not how a training text begins"):
        encode_rows(tokenizer, [PROMPT], [[{"role": "assistant", "content": THOUGHT}]])
