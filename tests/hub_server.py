"""A Hugging Face hub on this machine, as far as huggingface_hub asks for models: repositories of commits, LFS, tokens.

The library itself talks to it over HTTP. A file over 1 kB, or of weights, is stored as the hub stores large files: uploaded by
Git LFS and served by a redirect to another address.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install -e '.[hub]'")
import yaml  # one of its dependencies

WRITES, READS = "hf_writes", "hf_reads"  # tokens
OWNER = "owner"  # whose tokens they are
LICENCES = ("apache-2.0", "mit", "other")


@dataclasses.dataclass
class Repository:
    """One model.

    Attributes:
      commits: name -> {path: content}, oldest first.
      gated: asks for access, which no token here has.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=lambda: {_sha1(b""): {}})
    messages: list[str] = dataclasses.field(default_factory=list)

    @property
    def newest(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.newest]

    def commit(self, changes: dict[str, bytes], message: str = "") -> str:
        name = _sha1(f"{self.newest} {message} {[(path, _sha1(data)) for path, data in sorted(changes.items())]}".encode())
        self.commits[name] = self.files | changes
        self.messages.append(message)
        return name


@dataclasses.dataclass
class Hub:
    """What the server serves.

    Attributes:
      url: for HF_ENDPOINT.
      requests: "METHOD /path" of all so far.
      failing: answers 503 to what matches.
      silent: takes requests and does not answer.
    """

    url: str = ""
    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)
    requests: list[str] = dataclasses.field(default_factory=list)
    failing: str = "$^"
    silent: bool = False

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that uses this hub: its cache and its token are in `home`."""
        off = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        return off | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1"}

    def downloads(self) -> list[str]:
        """The files that were asked for."""
        asked = (re.fullmatch(r"HEAD /[^/]+/[^/]+/resolve/\w+/(.*)", line) for line in self.requests)
        return sorted({match[1] for match in asked if match})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _route(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        if self.hub.silent:
            time.sleep(3)
            self.close_connection = True
            return
        try:
            if re.search(self.hub.failing, path):
                raise _RefusedError(503, "", "Service unavailable")
            for pattern, methods, answer in _ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    answer(self, body, query, **match.groupdict())
                    return
            raise _RefusedError(404, "", f"no {self.command} {path} here")
        except _RefusedError as e:
            self._say({"error": str(e)}, e.status, {"X-Error-Code": e.code, "X-Error-Message": str(e)})

    do_GET = do_POST = do_PUT = do_HEAD = _route  # noqa: N815

    def log_message(self, *arguments) -> None:
        del arguments

    def _say(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITES, READS):
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        return token

    def _repository(self, name: str) -> Repository:
        token, found = self._token(), self.hub.repositories.get(name)
        if not found or (found.private and not token):
            raise _RefusedError(404 if token else 401, "RepoNotFound" if token else "", "Repository not found")
        return found

    def _may_write(self, name: str) -> None:
        if self._token() != WRITES or name.partition("/")[0].lower() != OWNER:
            raise _RefusedError(
                403, "", f"You don't have the rights to create a model under the namespace {name.partition('/')[0]!r}"
            )

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(name)
        commit = repository.newest if revision == "main" else revision
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def info(self, body, query, name, revision="main") -> None:
        commit, files = self._files(name, revision)
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "gated": repository.gated}
        self._say(facts | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body, query, name, revision) -> None:
        _, files = self._files(name, revision)
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry | ({"lfs": lfs} if _is_large(path, len(data)) else {}))
        self._say(entries)

    def resolve(self, body, query, name, revision, path) -> None:
        commit, files = self._files(name, revision)
        if self.hub.repositories[name].gated:
            raise _RefusedError(403, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not _is_large(path, len(data)):
            self._say(data, headers=headers | {"ETag": f'"{_git_hash(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": self._elsewhere(oid)}
        self._say(b"", 302, headers | linked)

    def large(self, body, query, oid) -> None:
        if "Authorization" in self.headers:
            raise _RefusedError(400, "", "a token that was sent to another host")
        data, given = self.hub.large[oid], self.headers.get("Range", "")
        first = int(given.removeprefix("bytes=").partition("-")[0]) if given else 0
        ranged = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if given else {}
        self._say(data[first:], 206 if given else 200, {"ETag": f'"{oid}"'} | ranged)

    def _elsewhere(self, oid: str) -> str:
        """On another host, as the hub has it, to which the library must not send the token."""
        return f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{oid}"

    def create(self, body, query) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self._may_write(name)
        if name in self.hub.repositories:
            self._say({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        self._say({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, body, query) -> None:
        front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        errors = [] if front["license"] in LICENCES else [{"message": f'"license" must be one of {", ".join(LICENCES)}'}]
        self._say({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, query, name, revision) -> None:
        self._may_write(name)
        _, files = self._files(name, revision)
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if _is_large(file["path"], file["size"]) else "regular"
            old = files.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else _git_hash(old)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._say({"files": answers})

    def batch(self, body, query, name) -> None:
        self._may_write(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            there = asked["oid"] in self.hub.large
            upload = {"upload": {"href": f"{self.hub.url}/cdn/{asked['oid']}"}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(asked | ({} if there else {"actions": upload}))
        self._say({"transfer": "basic", "objects": objects})

    def store(self, body, query, oid) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "", "not what was announced")
        self.hub.large[oid] = body
        self._say({})

    def verify(self, body, query) -> None:
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _RefusedError(404, "", "not uploaded")
        self._say({})

    def commit(self, body, query, name, revision) -> None:
        self._may_write(name)
        changes, message = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise _RefusedError(400, "", f"{line['key']} is not known here")
        commit = self._repository(name).commit(changes, message)
        self._say({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "hookOutput": ""})


_MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (_MODEL, ("GET",), _Handler.info),
    (rf"{_MODEL}/revision/(?P<revision>.+)", ("GET",), _Handler.info),
    (rf"{_MODEL}/tree/(?P<revision>[^/]+)", ("GET",), _Handler.tree),
    (r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", ("GET", "HEAD"), _Handler.resolve),
    (r"/cdn/(?P<oid>\w+)", ("GET", "HEAD"), _Handler.large),
    (r"/cdn/(?P<oid>\w+)", ("PUT",), _Handler.store),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate),
    (rf"{_MODEL}/preupload/(?P<revision>.+)", ("POST",), _Handler.preupload),
    (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", ("POST",), _Handler.batch),
    (r"/verify", ("POST",), _Handler.verify),
    (rf"{_MODEL}/commit/(?P<revision>.+)", ("POST",), _Handler.commit),
)


def _is_large(path: str, size: int) -> bool:
    return size > 1_000 or path.endswith((".safetensors", ".bin", ".pt"))


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return _sha1(f"blob {len(data)}\0".encode() + data)
