"""Completions from a server of the OpenAI format: vLLM, `transformers serve`, llama.cpp, a provider. No torch.

    with EndpointEngine(Endpoint("https://host/v1", "name"), EndpointCalls(), key) as engine:
        for answer in engine.generate([Request((), messages=[…])], sampling): ...

The first requests go one by one, so that a wrong URL, key or model ends the run before anything else is asked. What
may pass (429, 5xx, a time-out, a dropped connection, half an answer) is asked again, after a wait that doubles or that
the server has named. A request that never succeeds becomes a completion with `call.failure`; so many in a row that the
server must be gone raise EndpointError. No redirect is followed, since the key would go with it.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pipeline import __version__
from pipeline.config.endpoint import PATH, Endpoint, EndpointCalls, base_url, is_local
from pipeline.core.errors import EndpointError, PlanError
from pipeline.engines.engine import Answer, Call, Completion, Request, Sampling, Watch, seed_of
from pipeline.scoring.answers import CLOSE, OPEN

POLL_SECONDS = 0.2  # between two looks at whether the run shall stop
CONNECT_SECONDS = 10.0
FIRST_WAIT = 1.0  # seconds before the second attempt; then twice as long each time
LONGEST_WAIT = 60.0  # seconds, except where the server names a time
LONGEST_NAMED_WAIT = 600.0  # seconds of a Retry-After
FIRST_ATTEMPTS = 3  # of a first request that does not connect, or whose answer is not of the format
REFUSALS = 3  # first requests that the server refuses before no more are sent
GONE = 3  # failed requests in a row, at least as many as go at once, after which the server counts as gone
MAX_BYTES = 64 << 20  # of an answer
SHOWN = 300  # characters of what a server said, in a message
PASSING = (408, 409, 425, 429)  # beside 5xx
SHORTEST_SECRET = 8  # characters: a shorter key is a placeholder, such as EMPTY
SURROGATES = re.compile("[\ud800-\udfff]")


class Passing(Exception):
    """What may succeed when it is tried again."""

    def __init__(self, reason: str, *, wait: float | None = None, wrong: str | None = None, usage: bool = False):
        super().__init__(reason)
        self.wait = wait  # seconds that the server named
        self.wrong = wrong  # of a first request: what is wrong, if it does not pass at once
        self.usage = usage  # whether that is a user's mistake


class Refused(Exception):
    """What the server will not answer, however often it is asked."""


@dataclass(frozen=True)
class Reply:
    """What is read of a server's answer."""

    text: str
    truncated: bool
    prompt_tokens: int
    completion_tokens: int
    model: str


class EndpointEngine:
    """Asks one model of one server; at most `calls.concurrency` requests are under way at once."""

    name = "endpoint"

    def __init__(
        self,
        endpoint: Endpoint,
        calls: EndpointCalls,
        key: str | None = None,
        *,
        while_waiting: Callable[[], None] = lambda: None,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        """`while_waiting` is called often, and only when every finished answer has been yielded; it may raise."""
        self.endpoint, self.calls, self.key = endpoint, calls, key
        self.where = base_url(endpoint.url)
        self.variable = endpoint.key_variable or calls.key_variable
        self.while_waiting, self.first_wait = while_waiting, first_wait
        self.served: set[str] = set()  # the models that the server says have answered
        self.resume_at = 0.0  # the server has asked for no request before this time of the clock
        self.loop = asyncio.new_event_loop()
        headers = {"User-Agent": f"therefore/{__version__}"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # the whole request has its own limit
            limits=httpx.Limits(max_connections=calls.concurrency, max_keepalive_connections=calls.concurrency),
            follow_redirects=False,
            trust_env=not is_local(self.where),  # a proxy of the environment is for other machines
        )

    def __enter__(self) -> EndpointEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        if not self.loop.is_closed():
            self.loop.run_until_complete(self.client.aclose())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def update(self, policy: Any) -> None:
        raise NotImplementedError("a server has its own weights")

    def log_likelihood(self, ids: Sequence[int], labels: Sequence[int]) -> float:
        raise NotImplementedError("a server does not tell the likelihood of a given answer")

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False, watch: Watch | None = None
    ) -> Iterator[Answer]:
        """Yield every sample of every request once, as they finish; each is a request of its own to the server.

        Raises PlanError for a wrong URL, key or model, and EndpointError where the server is gone.
        """
        if logprobs or watch:
            raise NotImplementedError("a server yields whole texts")
        waiting = deque((k, sample) for k, request in enumerate(requests) for sample in request.numbers)
        bodies = {k: self._body(request, sampling) for k, request in enumerate(requests)}

        def start(first: bool = False) -> asyncio.Task[Answer]:
            k, sample = waiting.popleft()
            return self.loop.create_task(self._answer(bodies[k], requests[k], k, sample, first))

        active: set[asyncio.Task[Answer]] = set()
        failed: list[Answer] = []  # in a row; they count when another request is answered, or nothing is left
        try:
            yield from self._first(waiting, start)
            while waiting or active:
                while waiting and len(active) < self.calls.concurrency:
                    active.add(start())
                done, active = self._wait(active)
                errors = [error for task in done if (error := task.exception())]
                answers = [task.result() for task in done if not task.exception()]
                failed += [answer for answer in answers if _failed(answer)]
                if answered := [answer for answer in answers if not _failed(answer)]:
                    yield from failed
                    failed.clear()
                    yield from answered
                if errors:
                    raise errors[0]
                self._raise_if_gone(failed)
                if not done:
                    self.while_waiting()
            yield from failed
        finally:
            for task in active:
                task.cancel()
            if active:
                self.loop.run_until_complete(asyncio.gather(*active, return_exceptions=True))

    def _first(
        self,
        waiting: deque[tuple[int, int]],
        start: Callable[[bool], asyncio.Task[Answer]],
    ) -> Iterator[Answer]:
        """Ask one by one until the server has answered once."""
        refused = list[Answer]()
        while waiting:
            task = start(True)
            try:
                while not task.done():
                    self._wait({task})
                    if not task.done():
                        self.while_waiting()
            finally:
                if not task.done():
                    task.cancel()
                    self.loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            answer = task.result()
            if not answer.completion.call or not answer.completion.call.failure:
                yield from refused
                yield answer
                return
            refused.append(answer)
            if len(refused) == REFUSALS or not waiting:
                first = "first request" if len(refused) == 1 else f"first {len(refused)} requests"
                raise PlanError(
                    f"{self.where}: refuses the {first} for the model {self.endpoint.model!r}: "
                    f"{answer.completion.call.failure}. Fix: the model's name, or the endpoint's "
                    "parameters where the server takes others: {max_tokens: null, max_completion_tokens: 1024}"
                )

    def _wait(self, tasks: set[asyncio.Task[Answer]]) -> tuple[set[asyncio.Task[Answer]], set[asyncio.Task[Answer]]]:
        """Run the loop until a task has finished, for a moment at most. Returns those that have, and the others."""
        waited = asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return self.loop.run_until_complete(waited)

    def _raise_if_gone(self, failed: Sequence[Answer]) -> None:
        if len(failed) >= max(GONE, self.calls.concurrency):
            call = failed[-1].completion.call
            raise EndpointError(
                f"{self.where}: {len(failed)} requests in a row failed, the last with: {call and call.failure}. What "
                "was answered is kept. Fix: see that the server answers, then run the same command, which resumes"
            )

    # ---- one request

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """Return a request's body; what is neutral is left out, because not every server knows it."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p} if sampling.top_p != 1 else {}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    async def _answer(self, body: dict[str, Any], request: Request, k: int, sample: int, first: bool) -> Answer:
        """Ask until there is an answer, or no more attempts are left."""
        if body["temperature"] > 0:
            prompt = list(json.dumps(body["messages"]).encode())
            body = {**body, "seed": seed_of(request.seed, prompt, sample) & 0x7FFFFFFF}
        body = {name: value for name, value in (body | self.endpoint.parameters).items() if value is not None}
        attempt, refused = 0, False
        while True:
            attempt += 1
            await asyncio.sleep(max(0.0, self.resume_at - time.monotonic()))
            began = time.monotonic()
            try:
                reply = await self._attempt(body)
                break
            except Refused as error:
                failure, refused = str(error), True
            except Passing as error:
                if first and error.wrong and attempt == min(FIRST_ATTEMPTS, self.calls.attempts):
                    raise (PlanError if error.usage else EndpointError)(error.wrong) from None
                failure = f"{error}, {attempt} times" if attempt > 1 else str(error)
                if attempt < self.calls.attempts:
                    await self._back_off(attempt, error.wait)
                    continue
                if first:
                    raise EndpointError(
                        f"{self.where}: no answer to the first request: {failure}. Fix: see that the server answers, "
                        "then run the same command"
                    ) from None
            call = Call(round(time.monotonic() - began, 3), attempt, 0, 0, failure, refused)
            return Answer(k, sample, Completion("", [], False, call=call))
        self.served.add(reply.model)
        call = Call(round(time.monotonic() - began, 3), attempt, reply.prompt_tokens, reply.completion_tokens)
        return Answer(k, sample, Completion(reply.text, [], reply.truncated, call=call))

    async def _back_off(self, attempt: int, named: float | None) -> None:
        """Wait before the next attempt; before a time that the server has named, no other request is sent either."""
        if named is not None:
            self.resume_at = max(self.resume_at, time.monotonic() + named)
            await asyncio.sleep(random.uniform(0, min(1.0, self.first_wait)))
        else:
            await asyncio.sleep(min(LONGEST_WAIT, self.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1))

    async def _attempt(self, body: dict[str, Any]) -> Reply:
        """Send a request once. Raises Passing, Refused, or the error that ends the run."""
        try:
            async with asyncio.timeout(self.calls.timeout):
                async with self.client.stream("POST", self.where + PATH, json=body) as response:
                    text = self._clean(await _read(response))
        except TimeoutError:
            raise Passing(f"no answer within {self.calls.timeout:g} s (cluster.endpoint.timeout)") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            unknown = any(word in str(error).lower() for word in ("name or service", "nodename", "certificate", "ssl"))
            wrong = f"{self.where}: no connection: {self._clean(str(error))}. Fix: the URL, or start the server"
            raise Passing(f"no connection ({self._clean(str(error))})", wrong=wrong, usage=unknown) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Passing(f"the connection broke ({type(error).__name__})") from None
        if response.status_code == 200:
            return self._parsed(text, response)
        self._raise_for_status(response, text)
        raise AssertionError("unreachable")

    def _raise_for_status(self, response: httpx.Response, text: str) -> None:
        """Raise what an answer other than 200 means."""
        status, said = response.status_code, said_in(text)
        told = f"{status} {response.reason_phrase}{f': {said}' if said else ''}"
        if status in PASSING or status >= 500:
            raise Passing(told, wait=retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            state = "set" if self.key else "not set"
            raise PlanError(
                f"{self.where}: the key is refused ({told}); the variable {self.variable} is {state}. Fix: export "
                f"{self.variable}=…; on Slurm cluster.slurm.pass_environment=[{self.variable}] too"
            )
        if status == 404 or status == 405:
            raise PlanError(
                f"{self.where}: got {told}; expected a server of the OpenAI format with the model "
                f"{self.endpoint.model!r}. Fix: the URL, which often ends with /v1, or the model's name"
            )
        if status < 400:
            place = self._clean(response.headers.get("location", ""))[:SHOWN]
            raise PlanError(
                f"{self.where}: got {told} to {place!r}; expected an answer. Fix: name that URL, if it is right"
            )
        raise Refused(told)

    def _parsed(self, text: str, response: httpx.Response) -> Reply:
        """Read an answer. Raises Passing for half of one, or one that is not of the format."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            kind = (
                "HTML" if "html" in response.headers.get("content-type", "") or text.lstrip()[:1] == "<" else "no JSON"
            )
            wrong = (
                f"{self.where}: got {kind}; expected an answer of the OpenAI format. "
                "Fix: the URL, which often ends with /v1"
            )
            raise Passing(f"an answer that is {kind}", wrong=wrong, usage=True) from None
        try:
            return read_reply(value)
        except ValueError as odd:
            wrong = (
                f"{self.where}: got {odd}; expected an answer of the OpenAI format. Fix: the server, or its settings"
            )
            raise Passing(f"an answer with {odd}", wrong=wrong) from None

    def _clean(self, text: str) -> str:
        """The text without the key, which some servers repeat, and without halves of characters."""
        if self.key and len(self.key) >= SHORTEST_SECRET:
            text = text.replace(self.key, "[key]")
        return SURROGATES.sub("\ufffd", text)


def _failed(answer: Answer) -> bool:
    """Whether a request failed, as all do where the server is gone; one that the server refuses it has answered."""
    call = answer.completion.call
    return call is not None and call.failure is not None and not call.refused


async def _read(response: httpx.Response) -> str:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise Passing(f"an answer of more than {MAX_BYTES >> 20} MiB")
    return b"".join(parts).decode("utf-8", "replace")


def read_reply(value: Any) -> Reply:
    """Read a chat completion. Raises ValueError saying what is odd, and Refused where the server withholds the text."""
    if isinstance(value, dict) and "choices" not in value and "error" in value:
        raise ValueError(f"an error: {said_in(json.dumps(value))}")
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no choices")
    message, ending = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        raise ValueError("no message")
    if ending is not None and not isinstance(ending, str):
        raise ValueError("a finish_reason that is not a text")
    if ending == "content_filter":
        raise Refused("the server withheld the answer (content_filter)")
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = _content(message.get("content"))
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if not isinstance(thought, str) or (content is None and not thought):
        raise ValueError("no text" if isinstance(thought, str) else "a thought that is not a text")
    usage, model = value.get("usage"), value.get("model")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else 0 for n in counts)
    text = with_thought(thought, content or "")
    return Reply(SURROGATES.sub("\ufffd", text), ending == "length", prompt, completion, str(model or "")[:SHOWN])


def _content(value: Any) -> str | None:
    """The text of a message, which may come in parts. Raises ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value
    parts = [part.get("text") if isinstance(part, dict) else None for part in value] if isinstance(value, list) else []
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError("content that is not a text")
    return "".join(map(str, parts))


def with_thought(thought: str, content: str) -> str:
    """The completion as a model writes it: the thought in its tags, then the answer.

    A thought that only ends was opened by the server's chat format, so the tag is put back.
    """
    if thought:
        opened = f"{OPEN}\n{thought.strip(chr(10))}"
        return f"{opened}\n{CLOSE}\n{content}" if content else opened
    before, closed, _ = content.partition(CLOSE)
    return f"{OPEN}\n{content}" if closed and OPEN not in before else content


def said_in(text: str) -> str:
    """What a server says of an error: the message in its JSON, else the beginning of the text."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = text if "<" not in text[:100] else ""
    for name in ("error", "message", "detail"):
        value = value.get(name, value) if isinstance(value, Mapping) else value
    shown = value if isinstance(value, str) else json.dumps(value)
    return " ".join(shown.split())[:SHOWN].rstrip(".")


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After: a number, or a date. None without one, or for one that cannot be read."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(0.0, seconds), LONGEST_NAMED_WAIT) if seconds == seconds else None


def read_key(variable: str, environment: Mapping[str, str]) -> str | None:
    """Return the key that a variable of the environment holds; None without one. Raises PlanError without the key."""
    key = environment.get(variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise PlanError(
            f"{variable}: got characters that no key has, such as a blank or a line break. Fix: export it again"
        )
    return key or None
