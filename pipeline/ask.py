"""Ask one or several checkpoints a question, and watch thought and answer being written.

    python -m pipeline chat --ckpt runs/tiny/grpo-… "Premise: … Hypothesis: …"
    python -m pipeline chat --ckpt A --ckpt B --sample - < question.txt
    python -m pipeline chat --ckpt A                   questions from the terminal, one a line, in one conversation

A model is loaded, prompted and read as the evaluation does it; the verdict under an answer is the task's own reading.
Answers go to stdout, everything else to stderr. It keeps nothing: figures come from `python -m pipeline evaluate`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from pipeline.config.cluster import EvaluationEngine, MaxMemory
from pipeline.config.recipe import Recipe
from pipeline.core.errors import PlanError, printable, run_main
from pipeline.core.schema import added, parse
from pipeline.engines.engine import Completion, Engine, Request, Sampling
from pipeline.engines.loading import load_engine
from pipeline.engines.text import TextStream
from pipeline.models.loading import load_tokenizer, prompt_ids, template_opens_think
from pipeline.scoring.answers import CLOSE, OPEN, REASONS, split_thought
from pipeline.tasks.task import Grade, Message, Task, task_of
from pipeline.workflow.weights import find_checkpoint

CONVERSATION = 16_384  # tokens, at most, that vLLM keeps memory for
DIM, PLAIN = "\x1b[2m", "\x1b[22m"


@dataclass(frozen=True)
class Options:
    """What the command line says beside the checkpoints; None is the recipe's own."""

    question: str | None
    interactive: bool
    sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    max_new_tokens: int | None
    seed: int | None
    max_memory: MaxMemory | None
    generation: EvaluationEngine = added(EvaluationEngine())  # which engine answers


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint, and the recipe that says how it is loaded and read."""

    checkpoint: str
    recipe: Recipe


@dataclass(frozen=True)
class AskRequest:
    """What the command line hands to this process, as JSON."""

    checkpoints: tuple[CheckpointRequest, ...]
    options: Options


@dataclass
class LoadedModel:
    """A model that is loaded, and the conversation with it."""

    name: str
    engine: Engine
    stops: list[int]
    context: int  # tokens that it reads
    tokenizer: Any
    task: Task
    sampling: Sampling
    seed: int
    prompt_opens_think: bool
    turns: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    completion: Completion
    verdict: Grade
    seconds: float

    @property
    def read(self) -> str:
        """The answer the task reads, or why there is none."""
        if self.completion.truncated:
            return f"none: cut off after {self.completion.tokens} tokens (--max-new-tokens)"
        if self.verdict.answered:
            return printable(self.verdict.answer or "yes")
        return f"none that can be read: {REASONS.get(self.verdict.reason or '', REASONS['unread'])}"


def main() -> int:
    if sys.argv[1:2] != ["--order"]:  # started by hand: the command line resolves recipes and options, and comes back
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", "chat", *sys.argv[1:]])
    request, problems = parse(AskRequest, json.loads(sys.argv[2]))
    if request is None:
        raise PlanError(*problems)
    ask(request)
    return 0


def ask(request: AskRequest) -> None:
    """Every question to every checkpoint; a conversation keeps all models loaded, one question one at a time."""
    models: Any = (load(one, request.options) for one in request.checkpoints)
    models = list(models) if request.options.interactive else models
    for question in questions(request.options):
        answers: list[tuple[str, Answer]] = []
        for loaded in models:
            if len(request.checkpoints) > 1:
                print(f"== {loaded.name}")
            answers.append((loaded.name, answer_question(loaded, question, sys.stdout)))
            print(flush=True)
        if len(answers) > 1:
            print(table(answers), flush=True)
    last = request.checkpoints[-1].checkpoint
    print(f"\nnext:\n  python -m pipeline export --ckpt {last} --format merged16", file=sys.stderr)


def questions(options: Options) -> Iterator[str]:
    """The question of the command line; in a conversation those of stdin after it, one a line."""
    if options.question is not None:
        yield options.question
    live = sys.stdin.isatty() if options.interactive else False
    if live:
        import readline  # noqa: F401  (earlier questions come back with the arrow keys)
    while options.interactive:
        try:
            line = input("> " if live else "").strip()
        except EOFError:
            return
        if line:
            yield line


def load(wanted: CheckpointRequest, options: Options) -> LoadedModel:
    """A checkpoint with its tokenizer, in the recipe's precision and quantization."""
    started, recipe = time.time(), wanted.recipe
    print(f"loading {wanted.checkpoint} …", file=sys.stderr, flush=True)
    checkpoint = find_checkpoint(wanted.checkpoint)
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    held = load_engine(
        checkpoint,
        recipe.model,
        tokenizer,
        options.generation,
        rows=1,
        length=CONVERSATION,
        limits=options.max_memory,
        eager=True,
    )
    print(f"loaded in {time.time() - started:.1f} s", file=sys.stderr, flush=True)
    return LoadedModel(
        wanted.checkpoint,
        held.engine,
        held.stops,
        held.context,
        tokenizer,
        task_of(recipe.task, recipe.seed),
        sampling_of(recipe, options),
        recipe.seed if options.seed is None else options.seed,
        template_opens_think(tokenizer),
    )


def sampling_of(recipe: Recipe, options: Options) -> Sampling:
    """Return greedy sampling, or with an option that samples the recipe's: of its evaluation or, if greedy, of GRPO."""
    source = recipe.evaluate if recipe.evaluate.temperature else recipe.grpo
    given = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    values: dict[str, Any] = {name: getattr(source, name) if value is None else value for name, value in given.items()}
    if not options.sample and not any(value is not None for value in given.values()):
        values["temperature"] = 0.0
    return Sampling(**values, max_new_tokens=options.max_new_tokens or recipe.evaluate.max_new_tokens)


def answer_question(loaded: LoadedModel, question: str, out: TextIO) -> Answer:
    """Ask, print the answer as it is written and how it is read, and keep both turns."""
    example = loaded.task.example_from_text(question)
    messages = loaded.task.messages(example)
    turns = [*loaded.turns, *(messages[-1:] if loaded.turns else messages)]
    prompt = prompt_ids(loaded.tokenizer, [turns])[0]
    context = loaded.context
    if len(prompt) >= context:
        raise PlanError(
            f"the question has {len(prompt)} tokens with its chat format and what was said before, {loaded.name} reads "
            f"{context}: ask a shorter one{', or begin a new conversation' if loaded.turns else ''}"
        )
    room = min(loaded.sampling.max_new_tokens, context - len(prompt))
    sampling = Sampling(loaded.sampling.temperature, loaded.sampling.top_p, loaded.sampling.top_k, room)
    screen = Screen(loaded.prompt_opens_think, out)
    stream = TextStream(loaded.tokenizer, loaded.stops, screen.show)
    started = time.time()
    [answered] = loaded.engine.generate([Request(prompt, loaded.seed)], sampling, watch=stream.watch)
    completion = answered.completion
    screen.end(completion.text)
    verdict = loaded.task.judge(example, completion.text, loaded.prompt_opens_think, completion.truncated)
    answer = Answer(completion, verdict, time.time() - started)
    print(f"\n\nverdict: {answer.read}   ({completion.tokens} tokens, {answer.seconds:.1f} s)", file=out, flush=True)
    opened = f"{OPEN}\n" if loaded.prompt_opens_think else ""
    loaded.turns = [*turns, {"role": "assistant", "content": opened + completion.text}]
    return answer


class Screen:
    """Prints a text that grows, the thought dim where `out` is a terminal; a tag is printed when it is whole."""

    def __init__(self, prompt_opens_think: bool, out: TextIO) -> None:
        self.prompt_opens_think, self.out, self.shown = prompt_opens_think, out, 0
        self.terminal = out.isatty()
        self.dims = self.terminal and "NO_COLOR" not in os.environ
        if prompt_opens_think:  # the prompt has opened the thought already
            self._write(f"{OPEN}\n", dim=True)

    def show(self, text: str) -> None:
        """Print what of the text so far is new."""
        self._advance(text[: len(text) - _partial_tag_length(text)])

    def end(self, text: str) -> None:
        """Print the rest: no tag can follow."""
        self._advance(text)

    def _advance(self, text: str) -> None:
        answer = split_thought(text, self.prompt_opens_think).answer
        border = max(self.shown, len(text) - len(answer or ""))
        self._write(text[self.shown : border], dim=True)
        self._write(text[border:], dim=False)
        self.shown = max(self.shown, len(text))

    def _write(self, text: str, *, dim: bool) -> None:
        if text:
            text = printable(text) if self.terminal else text.encode(errors="replace").decode()
            self.out.write(f"{DIM}{text}{PLAIN}" if dim and self.dims else text)
            self.out.flush()


def _partial_tag_length(text: str) -> int:
    """How many characters at the end of the text may be the beginning of a tag."""
    return max(k for tag in (OPEN, CLOSE) for k in range(len(tag)) if text.endswith(tag[:k]))


def table(answers: list[tuple[str, Answer]]) -> str:
    """The checkpoints side by side."""
    width = max(len(name) for name, _ in answers)
    lines = [f"{'checkpoint':<{width}}  tokens  seconds  verdict"]
    for name, answer in answers:
        lines.append(f"{name:<{width}}  {answer.completion.tokens:>6}  {answer.seconds:>7.1f}  {answer.read}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
