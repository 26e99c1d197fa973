"""An endpoint: a model behind a server of the OpenAI format, and how such servers are called.

    Endpoint("https://host/v1", "name")        which model: a setting of the recipe
    EndpointCalls(concurrency=32)              how it is called: a setting of the cluster, part of no identity

The key is never a setting: the environment holds it, and settings name the variable.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.schema import PositiveFloat, PositiveInt, added

PATH = "/chat/completions"  # below the URL of an endpoint
OWN_PARAMETERS = ("messages", "model", "n", "stream")  # of a request: the evaluation sets them itself
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")  # of an endpoint of a recipe: a part of a folder's name
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Endpoint:
    """A model behind a server of the OpenAI format."""

    url: str  # that the server's /chat/completions is below: https://host/v1
    model: str  # as the server names it
    parameters: dict[str, Any] = added({})  # of each request, beside those of `evaluate`; null leaves one out
    key_variable: str | None = added(None)  # the environment variable that holds its key; null: the cluster's

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for a fingerprint."""
        more = {"parameters": self.parameters} if self.parameters else {}
        return {"url": base_url(self.url), "model": self.model, **more}


@dataclass(frozen=True)
class EndpointCalls:
    """How endpoints are called. Nothing here changes an answer."""

    concurrency: PositiveInt = 8  # requests that are under way at once
    timeout: PositiveFloat = 600.0  # seconds of a request, until its last byte
    attempts: PositiveInt = 8  # of a request, before its row counts as failed
    key_variable: str = "THEREFORE_API_KEY"  # the environment variable that holds the key, which is written nowhere
    allow_http: bool = False  # plain http to other machines, which everyone on the way can read


def base_url(url: str) -> str:
    """Return the URL without the path of chat completions and without a slash at its end."""
    return url.rstrip("/").removesuffix(PATH).rstrip("/")


def is_local(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def endpoint_problems(endpoint: Endpoint, calls: EndpointCalls, url: str, key: str) -> list[str]:
    """What is wrong with an endpoint's settings. `url` is what its URL is called, `key` what its settings are below."""
    found = [f"{url}: {problem}" for problem in _url_problems(endpoint.url, calls)]
    if not endpoint.model.strip() or not endpoint.model.isprintable():
        found.append(f"{key}model: got {endpoint.model!r}; expected the model's name at the server")
    for name in OWN_PARAMETERS:
        if name in endpoint.parameters:
            found.append(f"{key}parameters.{name}: got a value; expected none, because the evaluation sets {name}")
    if endpoint.key_variable is not None and not VARIABLE.fullmatch(endpoint.key_variable):
        found.append(_not_a_variable(f"{key}key_variable"))
    return found


def calls_problems(calls: EndpointCalls) -> list[str]:
    """What is wrong with the way endpoints are called."""
    return [] if VARIABLE.fullmatch(calls.key_variable) else [_not_a_variable("cluster.endpoint.key_variable")]


def _not_a_variable(key: str) -> str:
    """The value is not shown: it may be the key itself."""
    return f"{key}: got no variable's name; expected the name of one that holds the key, such as THEREFORE_API_KEY"


def _url_problems(url: str, calls: EndpointCalls) -> list[str]:
    expected = "expected https://HOST/v1, or http://localhost:PORT/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return [f"got a text that is not a URL; {expected}"]
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        secret = "Fix: keep the key in an environment variable (cluster.endpoint.key_variable)"
        return [f"got a URL with a user, a query or a fragment, which would be written to files; {expected}. {secret}"]
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        return [f"got {url[:200]!r}; {expected}"]
    if parts.scheme == "http" and not is_local(url) and not calls.allow_http:
        return [
            f"got {url[:200]!r}; expected https, because everyone between this machine and {host} can read plain http. "
            "Fix: https://…, or cluster.endpoint.allow_http=true where the network is trusted"
        ]
    return []
