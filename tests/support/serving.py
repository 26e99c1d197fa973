"""A real server of the OpenAI format, and a proxy before it that goes wrong as servers and networks do."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """Start `transformers serve` with one model; yields its URL."""
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model), "--host", LOOPBACK, "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.time() + START_SECONDS
        while not _answers(port):
            assert server.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            assert time.time() < until, f"the server does not answer:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield f"http://{LOOPBACK}:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@dataclass
class Proxy:
    """Hands requests on to `upstream`, or does what `fault` says of a request and its number among equal ones.

    Without an upstream every request has its fault.
    """

    fault: Callable[[bytes, int], str] = lambda body, number: ""
    upstream: str | None = None
    url: str = ""
    asked: Counter[bytes] = field(default_factory=Counter)  # by body
    answered: Counter[bytes] = field(default_factory=Counter)  # handed on and answered whole
    seen: list[dict[str, str]] = field(default_factory=list)  # headers
    released: threading.Event = field(default_factory=threading.Event)  # ends "hold"
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


FIXED: dict[str, tuple[int, dict[str, str], str]] = {  # fault -> status, headers, body
    "429": (429, {"Retry-After": "0"}, '{"error": {"message": "slow down"}}'),
    "429 soon": (429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}'),
    "500": (500, {}, '{"error": {"message": "engine died"}}'),
    "503": (503, {}, "<html>busy</html>"),
    "html": (200, {"Content-Type": "text/html"}, "<html><body>Welcome</body></html>"),
    "text": (200, {}, "hello"),
    "half json": (200, {}, '{"choices": [{"message": {"content": "Therefore: Y'),
    "empty choices": (200, {}, '{"choices": []}'),
    "null content": (200, {}, '{"choices": [{"message": {"content": null}}]}'),
    "number": (200, {}, '{"choices": [{"message": {"content": 7}}]}'),
    "list": (200, {}, "[1, 2]"),
    "400": (400, {}, '{"error": {"message": "maximum context length is 8"}}'),
    "401": (401, {}, '{"error": {"message": "Incorrect API key: KEY"}}'),  # KEY: the one that was sent
    "404": (404, {}, '{"error": {"message": "The model does not exist"}}'),
    "307": (307, {"Location": "http://other.invalid/v1/chat/completions"}, ""),
    "thought": (
        200,
        {},
        '{"choices": [{"message": {"content": "Therefore: Yes", "reasoning_content": "A causes B. KEY"}, '
        '"finish_reason": "stop"}], "usage": {"prompt_tokens": 9, "completion_tokens": 4}, "model": "thinker-1"}',
    ),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.proxy.lock:
            number = self.proxy.asked[body]
            self.proxy.asked[body] += 1
            self.proxy.seen.append(dict(self.headers))
            fault = self.proxy.fault(body, number)
        if fault == "hold":
            while not self.proxy.released.wait(0.05) and not self.proxy.ended.is_set():
                pass
            fault = "drop" if self._gone() or self.proxy.ended.is_set() else ""
        if fault == "drop":
            self.close_connection = True
        elif fault in FIXED:
            status, headers, text = FIXED[fault]
            self._send(status, headers, text.replace("KEY", self.headers.get("Authorization", "")[7:]).encode())
        else:
            self._hand_on(body, fault)

    def _gone(self) -> bool:
        """Whether the client has ended the connection."""
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.setblocking(True)

    def _hand_on(self, body: bytes, fault: str) -> None:
        assert self.proxy.upstream, fault
        at = urlsplit(self.proxy.upstream)
        upstream = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        path = at.path.removesuffix("/v1") + self.path
        upstream.request("POST", path, body, {"Content-Type": "application/json"})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault in ("half", "slow"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            while fault == "slow" and not self.proxy.ended.wait(0.1) and not self._gone():
                self.wfile.write(b" ")
            self.close_connection = True
            return
        self._send(answer.status, {}, content)
        if answer.status == 200:
            with self.proxy.lock:
                self.proxy.answered[body] += 1

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has left is what these tests are about."""


@contextlib.contextmanager
def proxy(fault: Callable[[bytes, int], str] | str, upstream: str | None = None) -> Iterator[Proxy]:
    """Start a proxy; a text is the fault of every request."""
    made = Proxy((lambda body, number: fault) if isinstance(fault, str) else fault, upstream)
    server = _Server((LOOPBACK, 0), type("Handler", (_Handler,), {"proxy": made}))
    made.url = f"http://{LOOPBACK}:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def question_of(body: bytes) -> str:
    """The last message of a request."""
    return str(json.loads(body)["messages"][-1]["content"])
