"""Endpoints end to end: `transformers serve` answers a task's rows, directly and through a proxy that goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import NANO, ROOT, only, run_cli, run_here
from serving import Proxy, proxy, question_of, transformers_serve

from pipeline.config.recipe import RandomInit
from pipeline.core.files import read_json, read_lines
from pipeline.models.loading import make_random_model
from pipeline.workflow.artifact import open_artifact

KEY = "sk-0123456789-secret"
ROWS = ["--task", "gsm8k", "task.source=sample", "--split", "validation", "task.params.validation=18"]
SMALL = ["evaluate.max_new_tokens=8", "report.bootstrap_samples=50"]
FAULTS = ["drop", "429", "", "500", "half", "half json", "slow", "503", "html", "null content"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights so large that every answer is another."""
    folder = tmp_path_factory.mktemp("served") / "wild"
    scratch = RandomInit("qwen2", 400, 32, 1, 2, 2, 64, 2048, 10000.0, 0.5)
    make_random_model(scratch, ["naïve → 你好 Therefore: Yes #### 42"] * 20, "chatml", folder, 3)
    return folder


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(model, tmp_path_factory.mktemp("server") / "log.txt") as url:
        yield url


def evaluate(url: str, model: Path, runs: Path, *words: str) -> Path:
    run_here("evaluate", "--endpoint", url, "--model", str(model), *ROWS, *SMALL, *words, "--runs", str(runs))
    return only(runs, "evaluations/*")


@pytest.fixture(scope="module")
def plain(served: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation without faults."""
    return evaluate(served, model, tmp_path_factory.mktemp("plain"))


def answers(folder: Path) -> dict[str, tuple[str, int, bool]]:
    records = read_lines(folder / "predictions.jsonl")
    found = {record["id"]: (record["completion"], record["tokens"], record["truncated"]) for record in records}
    assert len(found) == len(records) == 18
    return found


def test_a_server_answers_a_tasks_rows(plain: Path, model: Path) -> None:
    assert len(set(answers(plain).values())) > 9
    artifact = open_artifact(plain, deep=True)
    records = read_lines(plain / "predictions.jsonl")
    calls = artifact.metrics["endpoint"]
    assert calls == read_json(plain / "metrics.json")["endpoint"]
    assert (calls["failed"], calls["requests"]) == (0, 18)
    assert calls["completion_tokens"] == sum(record["tokens"] for record in records) > 18
    assert calls["prompt_tokens"] == sum(record["call"]["prompt_tokens"] for record in records) > 18
    assert calls["seconds"] > 0
    assert [name.removesuffix("@main") for name in calls["answered_by"]] == [str(model)]
    assert artifact.provenance["hardware"]["device"].startswith(f"{model} at http://127.0.0.1:")
    assert all(record["truncated"] is (record["tokens"] == 8) for record in records)


def test_faults_change_no_answer_and_each_row_is_answered_once(
    served: str, model: Path, plain: Path, tmp_path: Path
) -> None:
    order: list[bytes] = []

    def fault(body: bytes, number: int) -> str:
        if body not in order:
            order.append(body)
        return FAULTS[(order.index(body) + number) % len(FAULTS)] if number < 2 else ""

    with proxy(fault, served) as faulty:
        folder = evaluate(faulty.url, model, tmp_path, "cluster.endpoint.timeout=3")
    assert answers(folder) == answers(plain)
    assert len(faulty.answered) == 18
    assert set(faulty.answered.values()) == {1}
    calls = open_artifact(folder).metrics["endpoint"]
    assert calls["failed"] == 0
    assert calls["requests"] == sum(faulty.asked.values()) > 18


def test_a_row_that_fails_for_good_is_unanswered_with_its_reason(
    served: str, model: Path, plain: Path, tmp_path: Path
) -> None:
    bad: list[str] = []

    def fault(body: bytes, number: int) -> str:
        if len(bad) < 1 and faulty.asked[body] and len(faulty.asked) == 5:
            bad.append(question_of(body))
        return "500" if question_of(body) in bad else ""

    with proxy(fault, served) as faulty:
        folder = evaluate(faulty.url, model, tmp_path, "cluster.endpoint.attempts=2")
    expected = answers(plain)
    failed = [record for record in read_lines(folder / "predictions.jsonl") if record["call"]["failure"]]
    assert len(failed) == 1
    assert (failed[0]["answered"], failed[0]["correct"], failed[0]["reason"]) == (False, False, "request_failed")
    assert failed[0]["call"]["failure"] == "500 Internal Server Error: engine died, 2 times"
    assert {id: one for id, one in answers(folder).items() if id != failed[0]["id"]} == {
        id: one for id, one in expected.items() if id != failed[0]["id"]
    }
    artifact = open_artifact(folder)
    assert artifact.metrics["endpoint"]["failed"] == 1
    assert artifact.metrics["validation"]["reasons"]["request_failed"] == 1
    assert f"1 of 18 rows have no answer from {faulty.url}" in artifact.warnings[0]


def start(faulty: Proxy, model: Path, runs: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "pipeline.evaluate",
        "--endpoint",
        faulty.url,
        "--model",
        str(model),
        *ROWS,
        *SMALL,
    ]
    return subprocess.Popen(
        [*command, "--runs", str(runs)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "THEREFORE_API_KEY": KEY},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_evaluation_asks_only_what_has_no_answer(
    served: str, model: Path, plain: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with proxy(lambda body, count: "hold" if len(faulty.asked) > 6 else "", served) as faulty:
        process = start(faulty, model, tmp_path)
        until = time.time() + 120
        while sum(faulty.answered.values()) < 6 or len(faulty.asked) < 14:  # six answered, eight under way
            assert process.poll() is None, process.communicate()[0]
            assert time.time() < until
            time.sleep(0.05)
        process.send_signal(number)
        told = process.communicate(timeout=60)[0]
        assert process.returncode == 75, told
        folder = only(tmp_path, "evaluations/*")
        kept = [line for path in folder.glob("partial-*.jsonl") for line in read_lines(path)]
        assert len(kept) == 6
        faulty.released.set()
        process = start(faulty, model, tmp_path)
        told += process.communicate(timeout=120)[0]
    assert process.returncode == 0, told
    assert answers(folder) == answers(plain)
    assert len(faulty.answered) == 18
    assert set(faulty.answered.values()) == {1}
    assert all(KEY in headers["Authorization"] for headers in faulty.seen)
    written = told + "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written


def test_a_wrong_endpoint_is_one_sentence_and_a_code_before_anything_is_lost(
    served: str, model: Path, tmp_path: Path
) -> None:
    for url, name, code, told in (
        (
            served,
            "another",
            2,
            "refuses the first 3 requests for the model 'another': 400 Bad Request: Server is pinned",
        ),
        (served.removesuffix("/v1"), str(model), 2, "got 404 Not Found: Not Found; expected a server of the OpenAI"),
        ("http://127.0.0.1:9/v1", str(model), 1, "http://127.0.0.1:9/v1: no connection: "),
    ):
        words = ["evaluate", "--endpoint", url, "--model", name, *ROWS, *SMALL, "--runs", str(tmp_path)]
        done = run_cli(*words)
        assert done.returncode == code, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr + "".join(p.read_text() for p in tmp_path.rglob("log.txt"))


def test_a_recipes_endpoint_stands_in_its_report(served: str, model: Path, nano: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(nano / "tiny", runs / "tiny")
    shutil.rmtree(only(runs, "tiny/report-*"))
    endpoint = f"evaluate.endpoints.wild={{url: '{served}', model: '{model}'}}"
    done = run_cli("run", "tiny", *NANO, endpoint, "--runs", str(runs))
    assert done.returncode == 0, done.stderr
    assert "2 of 8 steps to run" in done.stderr
    folder = only(runs, "tiny/evaluate-endpoint-wild-*")
    assert open_artifact(folder).role == "endpoint-wild"
    report = json.loads((only(runs, "tiny/report-*") / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["tiny base", "tiny SFT", "tiny GRPO", "tiny wild"]
    assert [(one["before"], one["after"]) for one in report["differences"]] == [
        ("tiny base", "tiny SFT"),
        ("tiny SFT", "tiny GRPO"),
        ("tiny wild", "tiny GRPO"),
    ]
    assert any(f"the model {model} at {served}: 24 requests" in note for note in report["notes"])
    page = (only(runs, "tiny/report-*") / "report.html").read_text()
    assert '<span class="dot endpoint"></span>tiny wild' in page
    assert "Answers of tiny GRPO." in page
    ids = [[record["id"] for record in read_lines(path / "predictions.jsonl")] for path in runs.glob("tiny/evaluate-*")]
    assert all(one == ids[0] for one in ids)
