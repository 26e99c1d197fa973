"""A stand-in for the hub on this machine: one repository, served from a folder by the hub's own HTTP interface.

`receive` takes uploads instead: the calls of the hub's client that create a repository and commit files to it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@contextlib.contextmanager
def serve(name: str, folder: Path, kind: str = "model") -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as the model (or `dataset`) `name`. Yields the address and the list of what was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
            api, place = f"/api/{kind}s/{name}", name if kind == "model" else f"{kind}s/{name}"
            if path in (api, *(f"{api}/revision/{rev}" for rev in ("main", COMMIT))):
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return self.answer(json.dumps(info).encode(), "application/json", body)
            if path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": "0" * 40}
                    for file in files
                ]
                return self.answer(json.dumps(tree).encode(), "application/json", body)
            before, _, file_name = path.partition(f"/{place}/resolve/{COMMIT}/")
            file = folder / file_name
            if not before and file_name in files:
                return self.answer(file.read_bytes(), "application/octet-stream", body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def answer(self, content: bytes, kind: str, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with running(Hub) as address:
        yield address, asked


@contextlib.contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of this kind, and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


TOKENS = {"hf_write": "write", "hf_read": "read"}  # of the user `someone`


@contextlib.contextmanager
def receive(name: str, folder: Path, *, fails: str = "", public: bool = False) -> Iterator[tuple[str, list[Any]]]:
    """Take what is pushed to `name` into `folder`. Yields the address and the bodies of the calls, in their order.

    Small files come in the commit, weights by LFS. A call whose path has `fails` in it is refused. `public`: the
    repository was there before, and is.
    """
    calls: list[Any] = []
    blobs: dict[str, bytes] = {}
    folder.mkdir(parents=True, exist_ok=True)

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/whoami-v2":
                role = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
                if role is None:
                    return self.answer({"error": "Invalid credentials"}, 401)
                return self.answer(
                    {"name": "someone", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": role}}}
                )
            return self.answer({"id": name, "sha": COMMIT, "private": not public, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            calls.append((self.path, body))
            if fails and fails in self.path:
                return self.answer({"error": "out of order"}, 400)
            if self.path == "/api/repos/create":
                return self.answer({"url": f"{self.address}/{name}"})
            if self.path.startswith(f"/api/models/{name}/preupload/"):
                return self.answer({"files": [self.mode(file["path"]) for file in json.loads(body)["files"]]})
            if self.path == f"/{name}.git/info/lfs/objects/batch":
                objects = json.loads(body)["objects"]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}
                return self.answer({"transfer": "basic", "objects": objects})
            if self.path.startswith(f"/api/models/{name}/commit/"):
                for line in map(json.loads, body.splitlines()):
                    self.commit(line["key"], line["value"])
                url = f"{self.address}/{name}/commit/{COMMIT}"
                return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
            return self.answer({})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
            blobs[self.path.rpartition("/")[2]] = content
            self.answer({})

        def mode(self, path: str) -> dict[str, Any]:
            large = path.endswith((".safetensors", ".gguf"))
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        def commit(self, kind: str, value: dict[str, Any]) -> None:
            if kind == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            if kind == "lfsFile":
                (folder / value["path"]).write_bytes(blobs[value["oid"]])

        @property
        def address(self) -> str:
            return f"http://{self.headers['Host']}"

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with running(Hub) as address:
        yield address, calls
