"""A server on this machine that answers as the Hugging Face Hub does for one data set."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "a" * 40


@contextmanager
def fake_hub(name: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Serve the data set `name`; yields its revision and the value for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlparse(self.path).path)
            api = f"/api/datasets/{name}"
            if path in (api, f"{api}/revision/{REVISION}", f"{api}/revision/main"):
                self.reply(200, json.dumps(_description(name, files)).encode())
            elif path.startswith(f"{api}/tree/"):
                found = _tree(files, "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:]))
                self.reply(200 if found else 404, json.dumps(found).encode())
            elif path.startswith(f"{api}/paths-info/"):
                wanted = parse_qs(body.decode())["paths"]
                self.reply(
                    200, json.dumps([_file(files, p) for p in wanted if p in files]).encode()
                )
            elif path.startswith(f"/datasets/{name}/resolve/"):
                file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[2]
                headers = {"X_Repo_Commit": REVISION}
                if file in files:
                    self.reply(200, files[file], ETag=f'"{_hash(files[file])}"', **headers)
                else:
                    self.reply(404, X_Error_Code="EntryNotFound", **headers)
            else:
                self.reply(404, X_Error_Code="RepoNotFound")

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 - the names it calls

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield REVISION, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _description(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "id": name, "sha": REVISION, "private": False, "gated": False, "disabled": False,
        "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": f} for f in files],
    }  # fmt: skip


def _file(files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    return {"type": "file", "oid": _hash(files[path]), "size": len(files[path]), "path": path}


def _tree(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What stands directly in a folder."""
    start = f"{folder}/" if folder else ""
    inside = [path for path in files if path.startswith(start)]
    folders = {start + path[len(start) :].split("/")[0] for path in inside} - set(inside)
    return [
        *(_file(files, path) for path in inside if "/" not in path[len(start) :]),
        *({"type": "directory", "oid": "b" * 40, "size": 0, "path": path} for path in folders),
    ]
