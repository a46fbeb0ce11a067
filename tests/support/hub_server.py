"""A stand-in for the HTTP interface of the Hugging Face hub, for uploads: it records requests and keeps files."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_aSecretOfTheTests"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)
    """The messages of the commits."""

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class Hub:
    """The state of the hub, and the requests so far."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    """Part of a request's path -> the HTTP status to answer with."""
    requests: list[str] = field(default_factory=list)
    """Method and path."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content, of large files that were uploaded."""
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        status = next((status for part, status in self.hub.refusals.items() if part in path), None)
        if status is not None:
            self._send(status, {"error": "no"})
        elif not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "no"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            self._send(*_answer(self.hub, f"{self.command} {path}", body))

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _answer(hub: Hub, request: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
    """Return status, content and headers."""
    if request == "POST /api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in hub.repositories:
            return 409, {"error": "exists"}, {}
        hub.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {"url": f"{hub.url}/{name}"}, {}
    if request == "POST /api/validate-yaml":
        return 200, {"errors": [], "warnings": []}, {}
    if found := re.fullmatch(r"PUT /lfs/(\w+)", request):
        hub.blobs[found[1]] = body
        return 200, {}, {}
    if found := re.fullmatch(r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", request):
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}
    found = re.fullmatch(r"\w+ (?:/api/models)?/([^/]+/[^/]+)(?:/(\w+)(?:/(\w+))?(?:/(.*))?)?", request)
    repository = hub.repositories.get(found[1]) if found else None
    if found is None or repository is None:
        return 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}
    return _of_repository(found[1], repository, hub, (found[2], found[4]), body)


def _of_repository(
    name: str, repository: Repository, hub: Hub, asked: tuple[str | None, str | None], body: bytes
) -> tuple[int, Any, dict[str, str]]:
    what, file = asked
    if what is None or what == "revision":
        siblings = [{"rfilename": name} for name in repository.files]
        about = {"id": name, "private": repository.private, "sha": repository.sha, "siblings": siblings}
        return 200, {**about, "tags": [], "downloads": 0, "likes": 0}, {}
    if what == "preupload":
        files = [
            {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        return 200, {"files": files, "commitOid": repository.sha}, {}
    if what == "commit":
        return _commit(name, repository, hub, [json.loads(line) for line in body.splitlines()])
    if what == "resolve" and file in repository.files:
        return 200, repository.files[file], {"X-Repo-Commit": repository.sha, "ETag": f'"{repository.sha}"'}
    return 404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"}


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".certificate")) else "regular"


def _commit(
    name: str, repository: Repository, hub: Hub, lines: list[dict[str, Any]]
) -> tuple[int, Any, dict[str, str]]:
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, repository.sha):
        return 412, {"error": "a commit has happened since"}, {}
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "deletedFile":
            del repository.files[value["path"]]
            continue
        content = hub.blobs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
        repository.files[value["path"]] = content
    repository.commits.append(header["summary"])
    url = f"{hub.url}/{name}/commit/{repository.sha}"
    return 200, {"success": True, "commitOid": repository.sha, "commitUrl": url}, {}


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Run a stand-in, and let `huggingface_hub` use it with `TOKEN`. `folder`: for the client's own files."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
