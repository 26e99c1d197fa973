"""Endpoints: what is sent, what is read, when it is asked again, when the run ends, and that the key is nowhere."""

from __future__ import annotations

import contextlib
import email.utils
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import cluster_of, recipe_of
from running import ROOT, run_cli
from serving import free_port, proxy, question_of

from pipeline.config.endpoint import Endpoint, EndpointCalls, base_url, endpoint_problems
from pipeline.core.errors import EndpointError, PipelineError, PlanError, RecipeError
from pipeline.engines.endpoint import EndpointEngine, Refused, read_key, read_reply, retry_after, with_thought
from pipeline.engines.engine import Answer, Request, Sampling
from pipeline.scoring.answers import split_thought
from pipeline.tasks.task import task_names
from pipeline.workflow.plan import make_plan
from pipeline.workflow.single_step import endpoint_plan
from pipeline.workflow.stage import EvaluateEndpoint, read_spec, write_spec

KEY = "sk-0123456789-secret"
GREEDY = Sampling(0.0, 1.0, 0, 32)
CALLS = EndpointCalls(concurrency=4, timeout=5.0, attempts=4)
ROWS = [Request((), 1, messages=[{"role": "user", "content": f"question {k}"}]) for k in range(12)]


def ask(
    url: str,
    rows: list[Request] = ROWS,
    sampling: Sampling = GREEDY,
    calls: EndpointCalls = CALLS,
    endpoint: Endpoint | None = None,
) -> list[Answer]:
    given = replace(endpoint or Endpoint("", "m"), url=url)
    engine = EndpointEngine(given, calls, KEY, first_wait=0.01)
    try:
        return list(engine.generate(rows, sampling))
    finally:
        engine.close()


# ---------------------------------------------------------------- the first request


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("404", 2, "got 404 Not Found: The model does not exist; expected a server of the OpenAI format"),
        (
            "401",
            2,
            "the key is refused (401 Unauthorized: Incorrect API key: [key]); the variable THEREFORE_API_KEY is",
        ),
        ("html", 2, "got HTML; expected an answer of the OpenAI format. Fix: the URL, which often ends with /v1"),
        ("text", 2, "got no JSON; expected an answer of the OpenAI format"),
        ("307", 2, "got 307 Temporary Redirect to 'http://other.invalid/v1/chat/completions'; expected an answer"),
        ("400", 2, "refuses the first 3 requests for the model 'm': 400 Bad Request: maximum context length is 8"),
        ("empty choices", 1, "got no choices; expected an answer of the OpenAI format"),
        ("null content", 1, "got no text; expected an answer of the OpenAI format"),
        ("number", 1, "got content that is not a text; expected an answer"),
        ("list", 1, "got no choices; expected an answer"),
        ("500", 1, "no answer to the first request: 500 Internal Server Error: engine died, 4 times. Fix"),
        ("drop", 1, "no answer to the first request: the connection broke (RemoteProtocolError), 4 times"),
    ],
)
def test_an_endpoint_that_is_wrong_ends_the_run_at_once_with_one_sentence(fault: str, code: int, told: str) -> None:
    with proxy(fault) as server, pytest.raises(PipelineError) as raised:
        ask(server.url)
    assert raised.value.exit_code == code
    assert len(raised.value.problems) == 1
    assert told in str(raised.value)
    assert str(raised.value).startswith(server.url)
    assert KEY not in str(raised.value)
    assert sum(server.asked.values()) <= 4
    assert len(server.asked) <= 3  # the other rows were never sent


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EndpointError, match=r"no connection: .* Fix: the URL, or start the server"):
        ask(f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(PlanError, match="no connection"):
        ask("https://nowhere.invalid/v1")


def test_one_row_that_is_refused_does_not_end_the_run() -> None:
    def fault(body: bytes, number: int) -> str:
        return "400" if question_of(body) in ("question 0", "question 7") else "thought"

    with proxy(fault) as server:
        found = {answer.request: answer.completion for answer in ask(server.url)}
    failures = {k: one.call.failure for k, one in found.items() if one.call and one.call.failure}
    assert failures == dict.fromkeys((0, 7), "400 Bad Request: maximum context length is 8")
    assert set(found) == set(range(12))
    assert set(server.asked.values()) == {1}


# ---------------------------------------------------------------- asking again


@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "drop", "half json", "html", "empty choices", "null content", "number"]
)
def test_what_passes_is_asked_again(fault: str) -> None:
    with proxy(lambda body, number: fault if number < 2 else "thought") as server:
        found = ask(server.url)
    assert {answer.request for answer in found} == set(range(12))
    assert {answer.completion.call.attempts for answer in found if answer.completion.call} == {3}
    assert not [answer for answer in found if answer.completion.call and answer.completion.call.failure]
    assert set(server.asked.values()) == {3}


def test_a_row_that_always_fails_counts_as_failed_and_the_run_ends() -> None:
    bad = "question 5"
    with proxy(lambda body, number: "500" if question_of(body) == bad else "thought") as server:
        found = {answer.request: answer.completion for answer in ask(server.url)}
    assert set(found) == set(range(12))
    call = found[5].call
    assert call is not None
    assert call.failure == "500 Internal Server Error: engine died, 4 times"
    assert call.attempts == 4
    assert found[5].text == ""
    assert not [k for k, one in found.items() if k != 5 and one.call and one.call.failure]


def test_a_server_that_dies_ends_the_run_and_no_row_counts_as_failed() -> None:
    yielded: list[Answer] = []
    with proxy(
        lambda body, number: "thought" if question_of(body) in ("question 0", "question 1") else "drop"
    ) as server:
        engine = EndpointEngine(Endpoint(server.url, "m"), CALLS, first_wait=0.01)
        with pytest.raises(EndpointError, match=r"4 requests in a row failed, .* What was answered is kept"):
            yielded.extend(engine.generate(ROWS, GREEDY))
        engine.close()
    assert {answer.request for answer in yielded} == {0, 1}
    assert not [answer for answer in yielded if answer.completion.call and answer.completion.call.failure]


def test_a_key_that_is_refused_later_ends_the_run_after_what_was_answered() -> None:
    found: list[Answer] = []
    with proxy(lambda body, number: "401" if question_of(body) == "question 9" else "thought") as server:
        engine = EndpointEngine(Endpoint(server.url, "m"), replace(CALLS, concurrency=1), KEY, first_wait=0.01)
        with pytest.raises(PlanError, match="the key is refused"):
            found.extend(engine.generate(ROWS, GREEDY))
        engine.close()
    assert [answer.request for answer in found] == list(range(9))


def test_no_request_is_sent_before_the_time_that_the_server_names() -> None:
    times: list[float] = []

    def fault(body: bytes, number: int) -> str:
        times.append(time.monotonic())
        return "429 soon" if len(times) == 2 else "thought"

    with proxy(fault) as server:
        ask(server.url, calls=replace(CALLS, concurrency=1))
    assert len(times) == 13
    assert times[2] - times[1] >= 0.95


def test_a_slow_answer_ends_at_the_time_limit_and_is_asked_again(tmp_path: Path) -> None:
    def fault(body: bytes, number: int) -> str:
        return "hold" if question_of(body) == "question 3" and number == 0 else "thought"

    with proxy(fault) as server:
        found = {answer.request: answer.completion for answer in ask(server.url, calls=replace(CALLS, timeout=0.5))}
    assert found[3].call is not None
    assert found[3].call.attempts == 2
    assert len(found) == 12


def test_at_most_so_many_requests_are_under_way() -> None:
    under_way, most = 0, 0

    def fault(body: bytes, number: int) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        server.released.clear()
        return "hold"

    def poll() -> None:  # nothing is finished: let go what is held
        nonlocal under_way
        under_way = 0
        server.released.set()

    with proxy(fault) as server, proxy("thought") as upstream:
        server.upstream = upstream.url
        calls = replace(CALLS, concurrency=3)
        engine = EndpointEngine(Endpoint(server.url, "m"), calls, while_waiting=poll, first_wait=0.01)
        assert len(list(engine.generate(ROWS, GREEDY))) == 12
        engine.close()
    assert most == 3


# ---------------------------------------------------------------- what is sent and read


def test_what_is_sent() -> None:
    drawn = Sampling(0.7, 0.9, 20, 64, 1.1)
    more = Endpoint("", "m", {"max_tokens": None, "max_completion_tokens": 99, "reasoning_effort": "low"})
    with proxy("thought") as server:
        ask(server.url, ROWS[:1])
        ask(server.url, ROWS[:1], drawn)
        ask(server.url, ROWS[:1], drawn, endpoint=more)
        ask(server.url, [replace(ROWS[0], samples=3)], drawn)
    greedy, sampled, changed, *samples = [json.loads(body) for body in server.asked]
    messages = [{"role": "user", "content": "question 0"}]
    assert greedy == {"model": "m", "messages": messages, "max_tokens": 32, "temperature": 0.0}
    seed = sampled.pop("seed")
    assert 0 <= seed < 2**31
    assert sampled == greedy | {
        "max_tokens": 64,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
    }
    assert changed == {name: value for name, value in sampled.items() if name != "max_tokens"} | {
        "max_completion_tokens": 99,
        "reasoning_effort": "low",
        "seed": seed,
    }
    assert len({one["seed"] for one in [*samples, {"seed": seed}]}) == 3  # sample 0 is the one of before
    assert {one["Authorization"] for one in server.seen} == {f"Bearer {KEY}"}


def test_a_thought_apart_is_the_thought_and_the_key_is_no_part_of_it() -> None:
    with proxy("thought") as server:
        [answer] = ask(server.url, ROWS[:1])
    completion = answer.completion
    parts = split_thought(completion.text, False)
    assert (parts.thought, parts.answer, parts.well_formed) == ("\nA causes B. [key]\n", "\nTherefore: Yes", True)
    assert (completion.tokens, completion.call and completion.call.prompt_tokens) == (4, 9)


def reply(message: object, **more: object) -> object:
    return {"choices": [{"message": message, "finish_reason": "stop", **more}]}


def test_answers_of_many_servers_are_read() -> None:
    assert read_reply(reply({"content": "x"})).text == "x"
    assert read_reply(reply({"content": ""})).text == ""
    assert read_reply(reply({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})).text == "ab"
    assert read_reply(reply({"content": None, "refusal": "no"})).text == "no"
    assert read_reply(reply({"content": None, "reasoning": "hm"}, finish_reason="length")).text == "<think>\nhm"
    assert read_reply(reply({"content": "x"}, finish_reason="length")).truncated
    assert not read_reply(reply({"content": "x"}, finish_reason=None)).truncated
    assert read_reply(json.loads('{"choices": [{"message": {"content": "\\ud800x"}}]}')).text == "\ufffdx"
    with pytest.raises(Refused, match="content_filter"):
        read_reply(reply({"content": "x"}, finish_reason="content_filter"))
    with pytest.raises(ValueError, match="an error: quota"):
        read_reply({"error": {"message": "quota"}})
    assert with_thought("", "a thought</think>Therefore: No") == "<think>\na thought</think>Therefore: No"
    assert with_thought("", "<think>a</think>b") == "<think>a</think>b"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "error"]), inner)
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([None, "choices", "message"]))
def test_any_json_is_read_or_refused(value: object, wrapped: str | None) -> None:
    if wrapped:
        value = {"choices": [{"message": value} if wrapped == "message" else value]}
    read = None
    with contextlib.suppress(ValueError, Refused):
        read = read_reply(value)
    assert read is None or (isinstance(read.text, str) and min(read.prompt_tokens, read.completion_tokens) >= 0)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("3") == 3.0
    assert retry_after("-1") == 0.0
    assert retry_after("1e9") == 600.0
    assert retry_after("nan") is None
    assert retry_after("soon") is None
    assert retry_after(None) is None
    found = retry_after(email.utils.formatdate(time.time() + 30, usegmt=True))
    assert found is not None
    assert 27 <= found <= 31


def test_a_key_is_stripped_and_an_odd_one_refused_without_showing_it() -> None:
    assert read_key("K", {"K": f"{KEY}\n"}) == KEY
    assert read_key("K", {}) is None
    for odd in (f"{KEY}\nX-Admin: 1", f"{KEY}é", f"{KEY} x"):
        with pytest.raises(PlanError, match="K: got characters that no key has") as raised:
            read_key("K", {"K": odd})
        assert KEY not in str(raised.value)


# ---------------------------------------------------------------- settings and plans


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://example.com/v1", "expected https, because everyone between"),
        ("http://10.0.0.5:8000/v1", "expected https"),
        ("http://localhost.example.com/v1", "expected https"),
        (f"https://user:{KEY}@host/v1", "got a URL with a user, a query or a fragment"),
        (f"https://host/v1?key={KEY}", "got a URL with a user, a query or a fragment"),
        ("ftp://host/v1", "expected https://HOST/v1"),
        ("host/v1", "expected https://HOST/v1"),
        ("https://host:port/v1", "got a text that is not a URL"),
        ("", "expected https://HOST/v1"),
        ("https:///v1", "expected https://HOST/v1"),
    ],
)
def test_urls_that_are_refused(url: str, told: str) -> None:
    [problem] = endpoint_problems(Endpoint(url, "m"), EndpointCalls(), "--endpoint", "--")
    assert told in problem
    assert KEY not in problem


def test_urls_that_are_taken() -> None:
    for url in ("https://host/v1", "http://localhost:8000/v1", "http://127.0.0.1:1/v1/", "http://[::1]:8000/v1"):
        assert not endpoint_problems(Endpoint(url, "m"), EndpointCalls(), "--endpoint", "--")
    assert not endpoint_problems(Endpoint("http://h/v1", "m"), EndpointCalls(allow_http=True), "--endpoint", "--")
    assert base_url("https://host/v1/chat/completions/") == "https://host/v1"


URL = "evaluate.endpoints.gpt={url: 'https://host/v1', model: gpt-x}"


def test_an_endpoint_of_a_recipe_is_one_more_evaluation_and_changes_no_other_step(tmp_path: Path) -> None:
    before = {step.name: step for step in make_plan(["tiny"], runs=tmp_path).steps}
    after = {step.name: step for step in make_plan(["tiny"], [URL], runs=tmp_path).steps}
    assert set(after) - set(before) == {"evaluate-endpoint-gpt"}
    assert {name: step.fingerprint for name, step in after.items() if name in before and name != "report"} == {
        name: step.fingerprint for name, step in before.items() if name != "report"
    }
    assert after["report"].fingerprint != before["report"].fingerprint
    step = after["evaluate-endpoint-gpt"]
    assert step.runs_as.processes == "one"
    assert after["evaluate-base"].runs_as.processes == "all"
    assert step.payload["settings"]["endpoint"] == {"url": "https://host/v1", "model": "gpt-x"}
    same = make_plan(["tiny"], [URL, "evaluate.endpoints.gpt.key_variable=OTHER", "lora.r=8"], runs=tmp_path)
    assert next(s for s in same.steps if s.name == step.name).fingerprint == step.fingerprint
    other = make_plan(["tiny"], [URL, "evaluate.endpoints.gpt.parameters.seed=null"], runs=tmp_path)
    assert next(s for s in other.steps if s.name == step.name).fingerprint != step.fingerprint


def test_the_spec_of_an_endpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    from pipeline.workflow.plan import spec_of

    plan = endpoint_plan(Endpoint("https://host/v1", "org/m", {"seed": None}), ["tiny"], runs=tmp_path)
    [step] = plan.steps
    assert step.folder.name.startswith("org-m-")
    write_spec(step.folder, spec_of(step, plan.cluster))
    assert read_spec(step.folder).options == EvaluateEndpoint(Endpoint("https://host/v1", "org/m", {"seed": None}))


@pytest.mark.parametrize("task", task_names())
def test_a_task_alone_is_enough(task: str, tmp_path: Path) -> None:
    [step] = endpoint_plan(Endpoint("https://host/v1", "m"), task=task, limit=3, runs=tmp_path).steps
    assert (step.recipe.task.name, step.recipe.evaluate.splits, step.recipe.evaluate.limit) == (task, ("test",), 3)
    named = endpoint_plan(Endpoint("https://host/v1", "m"), ["evaluate.splits=[validation]"], task=task, runs=tmp_path)
    assert named.steps[0].recipe.evaluate.splits == ("validation",)


def test_mistakes_of_an_endpoint_are_reported_together() -> None:
    words = [
        "evaluate.endpoints.a.url=http://far/v1",
        "evaluate.endpoints.a.model=m",
        f"cluster.endpoint.key_variable={KEY}",
    ]
    words += ["evaluate.endpoints.b={url: 'https://h/v1', model: m, parameters: {stream: true}}"]
    with pytest.raises(RecipeError) as raised:
        make_plan(["tiny"], words[:2] + words[3:])
    assert "evaluate.endpoints.a.url: got 'http://far/v1'; expected https" in str(raised.value)
    assert "evaluate.endpoints.b.parameters.stream: got a value; expected none" in str(raised.value)
    with pytest.raises(RecipeError, match=r"cluster\.endpoint\.key_variable: got no variable's name") as raised:
        make_plan(["tiny"], words[2:3])
    assert KEY not in str(raised.value)
    with pytest.raises(RecipeError, match=r"evaluate\.endpoints: got the name 'a b'"):
        make_plan(["tiny"], ["evaluate.endpoints={'a b': {url: 'https://h/v1', model: m}}"])
    assert recipe_of("tiny").evaluate.endpoints == {}
    assert cluster_of("local").endpoint == EndpointCalls()


def test_mistakes_of_the_command_line() -> None:
    for words, told in (
        (["--endpoint", "http://far/v1", "--model", "m"], "--endpoint: got 'http://far/v1'; expected https"),
        (["--endpoint", "https://h/v1"], "--model: got none; expected the model's name at the server"),
        (
            ["--endpoint", "https://h/v1", "--model", "m", "--parameter", "x"],
            "--parameter: got 'x'; expected NAME=VALUE",
        ),
        (["--ckpt", "tests", "--model", "m"], "--model, --parameter: got one with --ckpt"),
    ):
        done = run_cli("evaluate", *words)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_an_endpoint_is_asked_without_torch() -> None:
    code = "import sys, pipeline.evaluate, pipeline.engines.endpoint\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'datasets'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
