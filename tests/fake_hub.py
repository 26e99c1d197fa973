"""A stand-in for the hub on this machine: one repository, served from a folder by the hub's own HTTP interface."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
