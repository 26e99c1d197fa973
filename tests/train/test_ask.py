"""ask: the answer as it is written, what the task reads in it, and several checkpoints side by side."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import only, run_cli

from pipeline.ask import (
    DIM,
    PLAIN,
    AskRequest,
    CheckpointRequest,
    Options,
    Screen,
    answer_question,
    ask,
    load,
    sampling_of,
)
from pipeline.config.cluster import MaxMemory
from pipeline.config.recipe import Model, RandomInit, Recipe, read
from pipeline.core.errors import PlanError
from pipeline.core.files import read_lines
from pipeline.core.hashing import plain
from pipeline.core.schema import parse
from pipeline.engines.engine import Request, Sampling
from pipeline.engines.text import TextStream, stop_ids
from pipeline.engines.transformers import TransformersEngine
from pipeline.models.loading import input_device, load_for_chat, load_tokenizer, make_random_model, prompt_ids
from pipeline.scoring.answers import CLOSE, OPEN
from pipeline.workflow.stage import read_spec
from pipeline.workflow.weights import find_checkpoint

QUESTION = "Premise: A correlates with B.\nHypothesis: A directly causes B."
GREEDY = Options(QUESTION, False, False, None, None, None, None, None, None)
MODEL = Model("m", None, None, None, None, "none", "auto", "float32")


def tiny() -> Recipe:
    recipe, _ = read("tiny", ["evaluate.max_new_tokens=24", "model.dtype=float32"])
    assert recipe is not None
    return recipe


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights so large that every answer is another, in strange characters too."""
    folder = tmp_path_factory.mktemp("wild")
    scratch = RandomInit("qwen2", 500, 32, 2, 2, 2, 64, 128, 10000.0, 0.5)
    make_random_model(
        scratch, ["naïve → 你好 A correlates with B. <think> hm </think> Therefore: Yes"] * 20, "think", folder, 3
    )
    return folder


# ---------------------------------------------------------------- as a user types it


def test_several_checkpoints_answer_side_by_side(nano: Path) -> None:
    sft, grpo = (str(only(nano, f"tiny/{stage}-*")) for stage in ("sft", "grpo"))
    done = run_cli("chat", "--ckpt", sft, "--ckpt", grpo, QUESTION, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("== ")] == [f"== {sft}", f"== {grpo}"]
    assert sum(line.startswith("verdict: ") for line in lines) == 2
    assert [line.split()[0] for line in lines[-3:]] == ["checkpoint", sft, grpo]
    assert "\x1b" not in done.stdout
    assert f"next:\n  python -m pipeline export --ckpt {grpo} --format merged16" in done.stderr
    assert f"loading {sft}" in done.stderr


def test_a_row_of_the_test_set_is_answered_as_the_evaluation_did(nano: Path) -> None:
    """One row alone against the evaluation's batch: the same prompt, precision, random stream and text."""
    folder = only(nano, "tiny/evaluate-grpo-*")
    order = read_spec(folder)
    rows = pq.read_table(only(nano, "tiny/preprocess-*") / "data" / "test.parquet").to_pylist()
    questions = {row["id"]: row["question"] for row in rows}
    row = next(row for row in read_lines(folder / "predictions.jsonl") if row["split"] == "test")
    out = io.StringIO()
    loaded = load(CheckpointRequest(order.inputs["model"], order.recipe), replace(GREEDY, sample=True))
    answer = answer_question(loaded, questions[row["id"]], out)
    assert out.getvalue().startswith(f"{OPEN}\n{row['completion']}\n\nverdict: ")
    assert (answer.completion.tokens, answer.completion.truncated) == (row["tokens"], row["truncated"])
    assert answer.verdict.answer == row["answer"]


def test_a_conversation_reads_questions_until_stdin_ends(
    wild: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nanother\n"))
    options = replace(GREEDY, question=None, interactive=True, max_new_tokens=5)
    ask(AskRequest((CheckpointRequest(str(wild), tiny()),), options))
    assert capsys.readouterr().out.count("verdict: ") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ckpt", "no/such/folder", "why?"], "checkpoint no/such/folder: no such folder"),
        (["--ckpt", "owner/name", "  "], "question: got an empty one; expected text. Fix: write it in quotes"),
        (["--ckpt", "owner/name", "--interactive", "-"], "--interactive: got - too; expected one of them"),
        (["--ckpt", "owner/name", "why?", "--temperature", "-1"], "--temperature: got -1.0; expected a number from 0"),
        (["--ckpt", "owner/name", "why?", "tinny"], "unknown recipe 'tinny'"),
        (["--ckpt", "owner/name", "why?", "cluster.max_memory={gpus: 3}"], "cluster.max_memory.gpus: unknown setting"),
        (["why?"], "the following arguments are required: --ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_before_a_model_is_loaded(words: list[str], told: str) -> None:
    done = run_cli("chat", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "loading" not in done.stderr


# ---------------------------------------------------------------- what is streamed


def test_the_stream_ends_with_the_completion_and_only_grows(wild: Path) -> None:
    checkpoint = find_checkpoint(str(wild))
    tokenizer, model = load_tokenizer(checkpoint, MODEL), load_for_chat(checkpoint, MODEL, None)
    for words in ("A correlates with B.", "你好", "naïve →"):
        told: list[str] = []
        prompt = prompt_ids(tokenizer, [[{"role": "user", "content": words}]])[0]
        stream = TextStream(tokenizer, stop_ids(model, tokenizer), told.append)
        engine = TransformersEngine(model, tokenizer, rows=1)
        [answer] = engine.generate([Request(prompt, 1)], Sampling(1.5, 1.0, 0, 40), watch=stream.watch)
        assert answer.completion.text.startswith(told[-1])
        assert len(told) > 5
        assert all(not text.endswith("\ufffd") for text in told[:-1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "a", "\n", "<", "Therefore: Yes", " ", "</th"]), max_size=8), st.booleans()
)
def test_what_is_shown_is_what_was_written(pieces: list[str], prompt_opens_think: bool) -> None:
    """However the text is cut into steps, a pipe gets all of it once."""
    text = "".join(pieces)
    out = io.StringIO()
    screen = Screen(prompt_opens_think, out)
    for end in range(len(text) + 1):
        screen.show(text[:end])
    screen.end(text)
    assert out.getvalue() == (f"{OPEN}\n" if prompt_opens_think else "") + text


@pytest.mark.parametrize("prompt_opens_think", [True, False])
def test_a_terminal_shows_the_thought_dim_and_the_answer_plain(
    prompt_opens_think: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    screen = Screen(prompt_opens_think, out)
    text = ("" if prompt_opens_think else OPEN) + "hm</think>\nTherefore: Yes"
    for end in range(len(text) + 1):
        screen.show(text[:end])
    screen.end(text)
    plain = "".join(part.partition(PLAIN)[2] for part in out.getvalue().split(DIM))
    assert plain == "\nTherefore: Yes"
    assert out.getvalue().replace(DIM, "").replace(PLAIN, "").endswith(text)
    monkeypatch.setenv("NO_COLOR", "1")
    quiet = Terminal()
    Screen(prompt_opens_think, quiet).end(text)
    assert DIM not in quiet.getvalue()


def test_an_answer_cannot_steer_the_terminal_and_a_pipe_gets_it_whole() -> None:
    text = "a\x1b]0;title\x07\x1b[2J\x9b1m\r</think>\x1b[31mYes"
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        screen = Screen(True, out)
        for end in range(len(text) + 1):
            screen.show(text[:end])
        screen.end(text)
    shown = terminal.getvalue().replace(DIM, "").replace(PLAIN, "")
    assert shown == f"{OPEN}\na␛]0;title␇␛[2J\ufffd1m␍</think>␛[31mYes"
    assert pipe.getvalue() == f"{OPEN}\n{text}"


# ---------------------------------------------------------------- how it is asked


def test_greedy_by_default_and_sampled_as_the_recipe_says() -> None:
    recipe = tiny()
    asked = replace(GREEDY, sample=True)
    assert sampling_of(recipe, GREEDY).temperature == 0
    e = recipe.evaluate
    assert e.temperature > 0
    assert sampling_of(recipe, asked) == Sampling(e.temperature, e.top_p, e.top_k, e.max_new_tokens)
    cold = replace(recipe, evaluate=replace(e, temperature=0.0))  # evaluation is greedy: as GRPO samples
    assert sampling_of(cold, asked).temperature == recipe.grpo.temperature > 0
    own = replace(GREEDY, temperature=0.3, top_p=0.5, top_k=7, max_new_tokens=9)
    assert sampling_of(recipe, own) == Sampling(0.3, 0.5, 7, 9)


def test_a_conversation_is_kept_and_its_end_is_told(wild: Path) -> None:
    recipe = tiny()
    recipe = replace(recipe, task=replace(recipe.task, params={**recipe.task.params, "instruction": "Say it."}))
    loaded = load(CheckpointRequest(str(wild), recipe), GREEDY)
    first = answer_question(loaded, QUESTION, io.StringIO())
    assert [turn["role"] for turn in loaded.turns] == ["user", "assistant"]
    assert loaded.turns[0]["content"] == f"{QUESTION}\nSay it."  # the task's own last line
    assert loaded.turns[1]["content"] == f"{OPEN}\n{first.completion.text}"
    loaded.turns *= 9
    with pytest.raises(PlanError, match=r"the question has \d+ tokens .* reads 128: .*begin a new conversation"):
        answer_question(loaded, QUESTION, io.StringIO())


def test_a_model_too_large_for_its_memory_answers_from_the_disk(wild: Path) -> None:
    """Nothing may lie on the CPU: accelerate reads every layer from disk, and the text is the same."""
    checkpoint = find_checkpoint(str(wild))
    tokenizer = load_tokenizer(checkpoint, MODEL)
    prompt = prompt_ids(tokenizer, [[{"role": "user", "content": QUESTION}]])
    whole = load_for_chat(checkpoint, MODEL, None)
    spread = load_for_chat(checkpoint, MODEL, MaxMemory(gpu=None, cpu=1e-6))
    assert "disk" in spread.hf_device_map.values()
    assert input_device(spread) == torch.device("cpu")
    greedy = Sampling(0.0, 1.0, 0, 16)
    engines = [TransformersEngine(model, tokenizer, rows=1) for model in (whole, spread)]
    one, other = (list(engine.generate([Request(prompt[0])], greedy)) for engine in engines)
    assert one == other


def test_an_order_survives_the_command_line() -> None:
    order = AskRequest((CheckpointRequest("x", tiny()),), GREEDY)
    again, problems = parse(AskRequest, json.loads(json.dumps(plain(order))))
    assert problems == []
    assert again == order
