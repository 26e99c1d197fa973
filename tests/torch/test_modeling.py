"""modeling: one chat format everywhere, what a checkpoint is, a model from nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.architectures import ARCHITECTURES, ModelType
from pipeline.config.recipe import Lora, Model, RandomInit, Recipe, read
from pipeline.core.errors import ArtifactError, RecipeError
from pipeline.models.loading import (
    add_lora,
    check_tokenizer,
    choose_dtype,
    encode_rows,
    load_model,
    load_tokenizer,
    make_random_model,
    prompt_ids,
    read_template,
    template_opens_think,
    train_tokenizer,
)
from pipeline.workflow.weights import Checkpoint, find_checkpoint

TEXTS = ["Premise: A correlates with B.\nHypothesis: A directly causes B.", "<think>\nPairs: A B linked.\n</think>"]
PROMPT = [{"role": "user", "content": "A correlates with B."}]
COMPLETION = [{"role": "assistant", "content": "<think>\nA B linked.\n</think>\nTherefore: No"}]
SCRATCH = RandomInit("qwen2", 400, 16, 1, 2, 2, 32, 128, 10000.0, 0.02)
MODEL = Model("m", None, SCRATCH, None, None, "none", "auto", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scratch")
    make_random_model(SCRATCH, TEXTS * 50, "think", out, 0)
    return out


def tiny() -> Recipe:
    recipe, _ = read("tiny")
    assert recipe is not None
    return recipe


# ---------------------------------------------------------------- chat format


def test_the_generation_prompt_opens_the_thought_and_begins_every_training_text(folder: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint(str(folder)), MODEL)
    prompt = tokenizer.decode(prompt_ids(tokenizer, [PROMPT])[0])
    assert prompt == "<|user|>A correlates with B.<|assistant|><think>\n"
    assert template_opens_think(tokenizer)
    row = encode_rows(tokenizer, [PROMPT], [COMPLETION])[0]
    assert tokenizer.decode(row["input_ids"]) == prompt + "A B linked.\n</think>\nTherefore: No<|end|>"


def test_the_loss_falls_on_what_the_model_writes_itself(folder: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint(str(folder)), MODEL)
    row = encode_rows(tokenizer, [PROMPT], [COMPLETION])[0]
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == "A B linked.\n</think>\nTherefore: No<|end|>"
    assert row["labels"][-1] == tokenizer.eos_token_id  # it learns to stop
    assert row["labels"][: -len(learned)] == [-100] * (len(row["labels"]) - len(learned))


def test_a_template_that_writes_the_prompt_otherwise_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint(str(folder)), MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>hm{% endif %}"
    )
    with pytest.raises(RecipeError, match=r"model\.chat_template: the generation prompt is not how"):
        encode_rows(tokenizer, [PROMPT], [COMPLETION])


def test_any_text_can_be_read_and_frequent_words_are_one_token() -> None:
    tokenizer = train_tokenizer([*TEXTS * 50], 400)
    strange = "naïve → 你好 \t«x» 12345\n\n"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len(tokenizer.encode(" correlates")) == 1
    assert tokenizer.tokenize("</think>") == ["</think>"]
    kept = tokenizer.decode(tokenizer.encode("x</think>y<|end|>"), skip_special_tokens=True)
    assert kept == "x</think>y"  # the tags are text: rewards have to see them
    assert train_tokenizer([*TEXTS * 50], 400).get_vocab() == tokenizer.get_vocab()


def test_phrases_of_prompts_are_one_token_and_words_of_answers_are() -> None:
    prompts = ["A correlates with B. However, A and C are independent given B."] * 20
    answers = ["A B linked. A C apart given B."] * 20
    tokenizer = train_tokenizer(answers, 600, prompts=prompts)
    whole = tokenizer.tokenize("C correlates with A. B and C are independent given A.")
    assert [word.replace("Ġ", "_") for word in whole] == [
        *("C", "_correlates_with", "_A", ".", "_B", "_and", "_C", "_are_independent_given", "_A", ".")
    ]
    assert len(tokenizer.encode(" A C apart given B.")) == len([" A", " C", " apart", " given", " B", "."])
    strange = "naïve → 你好 \t«x»  12345 CamelCase A1 Ärger\n\n"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert train_tokenizer(answers, 600, prompts=prompts).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_tokenizer_with_phrases_is_loaded_as_it_was_trained_or_refused(
    architecture: ModelType, tmp_path: Path
) -> None:
    texts, prompts = ["A B linked."] * 20, ["A correlates with B."] * 20
    scratch = RandomInit(architecture, 600, 32, 1, 2, 2, 64, 128, 10000.0, 0.02, "phrases")
    if architecture == "qwen2":
        with pytest.raises(RecipeError, match=r"random_init\.tokens: got phrases with architecture qwen2, .*=llama"):
            make_random_model(scratch, texts, "think", tmp_path, 1, prompts)
        return
    make_random_model(scratch, texts, "think", tmp_path, 1, prompts)
    tokenizer = load_tokenizer(find_checkpoint(str(tmp_path)), MODEL)
    assert len(tokenizer.encode(" correlates with", add_special_tokens=False)) == 1


def test_the_tokenizer_of_words_is_what_it_was(tmp_path: Path) -> None:
    """Prompts and answers apart give the tokens of both together: what was trained keeps its fingerprint."""
    scratch = RandomInit("qwen2", 600, 32, 1, 2, 2, 64, 128, 10000.0, 0.02)
    for name, texts, prompts in (
        ("one", TEXTS[:1] * 20, TEXTS[1:] * 20),
        ("all", [*TEXTS[:1] * 20, *TEXTS[1:] * 20], []),
    ):
        make_random_model(scratch, texts, "think", tmp_path / name, 1, prompts)
    one, both = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "all"))
    assert one == both


def test_pad_is_not_the_stop_token(folder: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint(str(folder)), MODEL)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


def test_templates_are_found_by_name_or_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("x")
    assert read_template(str(file)) == "x"
    assert "<think>" in read_template("think")
    with pytest.raises(RecipeError, match=r"model\.chat_template: got 'thnk'; expected one of think"):
        read_template("thnk")


# ---------------------------------------------------------------- what a checkpoint is


def test_a_model_from_nothing_is_an_ordinary_model_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 20_000
    assert find_checkpoint(str(folder)) == Checkpoint(str(folder), None, str(folder))


def test_the_same_seed_draws_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_random_model(SCRATCH, TEXTS, "think", tmp_path / name, seed)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same != other


def test_a_hub_id_is_taken_as_one() -> None:
    assert find_checkpoint("owner/name") == Checkpoint("owner/name", None, "owner/name")


def test_an_adapter_is_loaded_on_its_base(folder: Path, tmp_path: Path) -> None:
    base = load_model(find_checkpoint(str(folder)), MODEL, dtype=torch.float32)
    lora = Lora(True, 4, 8.0, 0.0, ("all-linear",))
    add_lora(base, lora, keep_dtype=False).save_pretrained(tmp_path)
    found = find_checkpoint(str(tmp_path))
    assert found == Checkpoint(str(folder), tmp_path, str(folder))
    model = load_model(found, MODEL, dtype=torch.float32, train_adapter=True)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora" in name for name in trainable)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (None, "no such folder; give a step's folder, a checkpoint or a hub id"),
        ([], "neither config.json nor adapter_config.json in it; it holds nothing"),
        (["notes.txt"], "it holds notes.txt"),
        (["config.json"], "half-written, config.json without weights"),
        (["adapter_config.json"], "half-written or does not name its base model"),
        (["step.json"], "that step has not ended"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_told_why(tmp_path: Path, files: list[str] | None, told: str) -> None:
    where = tmp_path / "ckpt"
    if files is not None:
        where.mkdir()
        for name in files:
            (where / name).write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        find_checkpoint(str(where))
    assert told in str(caught.value)
    assert str(where) in str(caught.value)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="a file; give the folder that holds it"):
        find_checkpoint(str(folder / "config.json"))


def test_broken_weights_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(find_checkpoint(str(tmp_path / "broken")), MODEL, dtype=torch.float32)


def test_the_tokenizer_of_another_model_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mixed")
    other = train_tokenizer([f"word{chr(97 + k)} other{chr(97 + k)}" for k in range(26)] * 20, 500)
    other.chat_template = read_template("think")
    other.save_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (tmp_path / "mixed" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    checkpoint = find_checkpoint(str(tmp_path / "mixed"))
    model = load_model(checkpoint, MODEL, dtype=torch.float32)
    with pytest.raises(ArtifactError) as caught:
        check_tokenizer(load_tokenizer(checkpoint, MODEL), model, checkpoint)
    assert "belongs to another model" in str(caught.value)
    assert "its stop token is 1 (<|end|>), the model's [7]" in str(caught.value)
    check_tokenizer(load_tokenizer(find_checkpoint(str(folder)), MODEL), model.from_pretrained(folder), checkpoint)


def test_precision_is_decided_in_one_place() -> None:
    assert choose_dtype(MODEL) is torch.float32
    assert choose_dtype(tiny().model) is torch.float32  # as its recipe says


def test_a_model_from_nothing_embeds_every_token_of_its_tokenizer_whatever_their_number(tmp_path: Path) -> None:
    """Loading adds a token of the family: of sizes rounded up to 16s, one in sixteen would have no room for it."""
    for size in range(268, 284):
        folder = tmp_path / str(size)
        make_random_model(replace(SCRATCH, vocabulary=size), TEXTS * 50, "think", folder, 0)
        checkpoint = find_checkpoint(str(folder))
        tokenizer = load_tokenizer(checkpoint, MODEL)
        check_tokenizer(tokenizer, load_model(checkpoint, MODEL, dtype=torch.float32), checkpoint)
