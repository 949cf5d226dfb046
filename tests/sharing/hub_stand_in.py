"""A stand-in for the hub's endpoint, which speaks its protocol as far as a model is sent.

Repositories, branches, `preupload`, the LFS batch API with PUT and verify, and commits as NDJSON: what huggingface_hub
itself asks for. It keeps what it is sent, refuses a commit of a file that was never sent, and fails by script.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_theTokenOfThisTest"  # noqa: S105 - of no account
BATCH = ".git/info/lfs/objects/batch"
LARGE = 1000  # bytes from which a file goes by LFS; safetensors always do


class Stored(NamedTuple):
    """A file in a repository."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As `preupload` tells it: SHA-256 of large files, git's own of others."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """One model's repository: files by branch, newest state only, and how many commits there were."""

    is_private: bool
    branches: dict[str, dict[str, Stored]] = field(
        default_factory=lambda: {"main": {".gitattributes": Stored(b"*.safetensors filter=lfs\n", is_lfs=False)}}
    )
    commits: list[str] = field(default_factory=lambda: [f"{0:040x}"])
    states: dict[str, dict[str, Stored]] = field(default_factory=dict)


class HubStandIn:
    """Listens on a free port of this machine.

    Attributes:
        repositories: By `owner/name`.
        objects: Large files that were sent, by SHA-256; a commit may name no others.
        owners: Who the token may write for.
        hidden: Repositories that exist and that the token does not see.
        puts: The SHA-256 of each upload that began.
        seen: `METHOD path` of each request.
        tokens: Every Authorization header that came.
        breaks_after: Uploads that may be whole; the connection is broken off in the next one.
        hangs: Uploads after those wait until this is set, and then fail.
        ignored: Patterns that the repository's `.gitignore` leaves out.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.owners = {"me"}
        self.hidden: set[str] = set()
        self.puts: list[str] = []
        self.seen: list[str] = []
        self.tokens: set[str | None] = set()
        self.breaks_after: int | None = None
        self.hangs: threading.Event | None = None
        self.ignored: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[HubStandIn]:
        """Answer while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What lies on a branch."""
        return {name: stored.content for name, stored in self.repositories[repo].branches[branch].items()}

    def may_put(self) -> bool:
        """Whether the upload that begins now may be whole."""
        with self._lock:
            return self.breaks_after is None or len(self.puts) <= self.breaks_after


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def _handler_of(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_PUT(self) -> None:
            sha256 = self.path.rpartition("/")[2]
            hub.puts.append(sha256)
            if not hub.may_put():
                self.rfile.read(10)  # of more: the rest never comes, as the connection is gone
                if hub.hangs is not None:
                    hub.hangs.wait(60)
                self.close_connection = True
                return
            content = self._body()
            if hashlib.sha256(content).hexdigest() != sha256:
                self._send(400, {"error": "other bytes than were announced"})
                return
            hub.objects[sha256] = content
            self._send(200, {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/agent-harnesses":  # what the client asks for itself, without a token
                self._send(404, {})
                return
            hub.seen.append(f"{method} {path}")
            hub.tokens.add(self.headers.get("Authorization"))
            body = self._body()
            try:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise RefusalError(401, "Invalid credentials in Authorization header")
                self._send(200, _reply(hub, method, path, body))
            except RefusalError as refusal:
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._send(refusal.status, {"error": str(refusal)}, headers)

        def _send(self, status: int, values: Any, headers: Mapping[str, str] | None = None) -> None:
            content = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def _reply(hub: HubStandIn, method: str, path: str, body: bytes) -> Any:
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if path == "/api/validate-yaml":
        assert isinstance(yaml.safe_load(json.loads(body)["content"].split("---\n", 2)[1]), dict)
        return {"errors": [], "warnings": []}
    if path.startswith("/api/models/"):
        return _of_repository(hub, method, path, body)
    if path == "/lfs/verify":
        if json.loads(body)["oid"] not in hub.objects:
            raise RefusalError(404, "never sent")
        return {}
    assert path.endswith(BATCH), path
    _writable(hub, path.removesuffix(BATCH).strip("/"))
    return _batch(hub, json.loads(body))


def _of_repository(hub: HubStandIn, method: str, path: str, body: bytes) -> Any:
    owner, name, *rest = path.removeprefix("/api/models/").split("/", 4)
    repo = f"{owner}/{name}"
    found = _visible(hub, repo)
    what = rest[0] if rest else "revision"
    revision = "/".join(rest[1:]) or "main"
    if method == "POST":
        _writable(hub, repo)
    does: Mapping[str, Callable[[], Any]] = {
        "revision": lambda: _info(hub, repo, revision),
        "tree": lambda: [_entry(path, stored) for path, stored in sorted(_state(found, revision).items())],
        "branch": lambda: _branch(found, revision),
        "preupload": lambda: _preupload(hub, _state(found, revision), json.loads(body)),
        "commit": lambda: _commit(hub, repo, revision, body),
    }
    return does[what]()


def _branch(repository: Repository, name: str) -> Any:
    if name in repository.branches:
        raise RefusalError(409, "Reference already exists")
    repository.branches[name] = dict(repository.branches["main"])
    return {}


def _visible(hub: HubStandIn, repo: str) -> Repository:
    if repo in hub.hidden or repo not in hub.repositories:
        raise RefusalError(404, "Repository not found", "RepoNotFound")
    return hub.repositories[repo]


def _writable(hub: HubStandIn, repo: str) -> None:
    if repo.partition("/")[0] not in hub.owners:
        raise RefusalError(403, "You don't have the rights to write there")


def _state(repository: Repository, revision: str) -> dict[str, Stored]:
    if revision in repository.branches:
        return repository.branches[revision]
    if revision not in repository.states:
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repository.states[revision]


def _create(hub: HubStandIn, asked: Mapping[str, Any]) -> Any:
    repo = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] not in hub.owners:
        raise RefusalError(403, "You don't have the rights to create a model under that namespace")
    if repo in hub.repositories or repo in hub.hidden:
        raise RefusalError(409, "You already created this model repo")
    is_private = asked.get("visibility") == "private" or asked.get("private") is True
    hub.repositories[repo] = Repository(is_private)
    return {"url": f"{hub.url}/{repo}", "name": repo}


def _info(hub: HubStandIn, repo: str, revision: str) -> Any:
    repository = hub.repositories[repo]
    state = _state(repository, revision)
    return {
        "_id": "0",
        "id": repo,
        "modelId": repo,
        "sha": repository.commits[-1],
        "private": repository.is_private,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": name} for name in state],
    }


def _entry(name: str, stored: Stored) -> Any:
    size = len(stored.content)
    found: dict[str, Any] = {"type": "file", "oid": stored.oid[:40], "size": size, "path": name}
    return found | ({"lfs": {"oid": stored.oid, "size": size, "pointerSize": 134}} if stored.is_lfs else {})


def _preupload(hub: HubStandIn, state: Mapping[str, Stored], asked: Mapping[str, Any]) -> Any:
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE or file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(file["path"], pattern) for pattern in hub.ignored),
                **({"oid": state[file["path"]].oid} if file["path"] in state else {}),
            }
            for file in asked["files"]
        ]
    }


def _batch(hub: HubStandIn, asked: Mapping[str, Any]) -> Any:
    """What is there already needs no upload, and has no actions."""
    assert asked["operation"] == "upload"
    assert asked["hash_algo"] == "sha256"

    def told(one: Mapping[str, Any]) -> Any:
        actions = {
            "upload": {"href": f"{hub.url}/lfs/put/{one['oid']}"},
            "verify": {"href": f"{hub.url}/lfs/verify"},
        }
        return {"oid": one["oid"], "size": one["size"], **({} if one["oid"] in hub.objects else {"actions": actions})}

    return {"transfer": "basic", "objects": [told(one) for one in asked["objects"]]}


def _commit(hub: HubStandIn, repo: str, revision: str, body: bytes) -> Any:
    repository = hub.repositories[repo]
    state = dict(_state(repository, revision))
    for line in body.decode().splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "file":
            state[value["path"]] = Stored(base64.b64decode(value["content"]), is_lfs=False)
        elif entry["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                raise RefusalError(400, f"{value['path']} was never sent")
            state[value["path"]] = Stored(hub.objects[value["oid"]], is_lfs=True)
        elif entry["key"] == "deletedFile":
            del state[value["path"]]
        else:
            assert entry["key"] == "header", entry
    commit = f"{len(repository.commits):040x}"
    repository.commits.append(commit)
    repository.branches[revision] = repository.states[commit] = state
    return {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}"}
