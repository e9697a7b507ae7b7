"""A stand-in for the Hugging Face hub: a real HTTP server on this machine, repositories in memory.

It answers the requests that huggingface_hub makes to upload and download models. In the test's
process the client's own ``set_client_factory`` diverts the hub's requests here; other processes
find it by ``HF_ENDPOINT``. There is no Xet, the hub's storage service: files come within the commit
or, with xet disabled, by plain LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
import yaml
from huggingface_hub import set_client_factory
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

TOKENS = {"hf_owner": "owner", "hf_guest": "guest"}
"""The owners of tokens, who may write only under their own names."""


@dataclass
class Repository:
    """A repository: the files by path of each commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Put files on a branch; returns the commit's name."""
        name = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


class RefusedError(Exception):
    """An error as the hub answers it."""

    def __init__(
        self, status: int, message: str, code: str = "", more: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message} | (more or {})
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


class HubStandIn(ThreadingHTTPServer):
    """The server and its repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        """Files that came by LFS, by SHA-256."""
        self.lfs_from = float("inf")
        """The size in bytes from which files come by LFS."""
        self.largest = float("inf")
        """The largest commit that is accepted, in bytes."""
        self.asked: list[str] = []
        """Every request, as ``GET /path``."""

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commit all files of a folder to a branch of a repository; returns the commit's name."""
        paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        files = {place: path.read_bytes() for place, path in paths.items()}
        return self.repositories.setdefault(repo, Repository()).commit(branch, files, branch)

    def downloaded(self, repo: str) -> set[str]:
        """The files of a repository that were downloaded, by their place in it."""
        matches = (re.fullmatch(rf"GET /{repo}/resolve/[^/]+/(.+)", asked) for asked in self.asked)
        return {match[1] for match in matches if match}

    def changes(self) -> list[str]:
        """The requests that change something."""
        return [asked for asked in self.asked if re.match(r"POST .*/(create|commit)|PUT", asked)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Find the route, and send its result."""
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = b"".join(self.receive())
        self.server.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = TOKENS.get(token)
        try:
            if token and self.user is None:
                raise RefusedError(401, "Invalid credentials in Authorization header")
            for methods, pattern, route in ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    return self.send(200, route(self, **match.groupdict()))
            raise RefusedError(404, f"no route for {self.command} {path}")
        except RefusedError as refusal:
            return self.send(refusal.status, refusal.content, refusal.headers)

    def receive(self) -> Iterator[bytes]:
        """Read the request's body, whose length is given at its start or by chunk."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(content, tuple):
            content, headers = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Keep standard error clean."""

    def repository(self, repo: str, *, write: bool = False) -> Repository:
        found = self.server.repositories.get(repo)
        owner = self.user == repo.partition("/")[0]
        if found is None or (found.private and not owner):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise RefusedError(403, "You are not the owner of this repository")
        return found

    def commit_of(self, repo: str, revision: str) -> tuple[Repository, str]:
        found = self.repository(repo)
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            raise RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return found, commit

    def whoami(self) -> Any:
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user}

    def create(self) -> Any:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != self.user:
            raise RefusedError(403, "You may not create a model under this namespace")
        there = {"url": f"{ENDPOINT}/{repo}", "name": repo}
        if repo in self.server.repositories:
            raise RefusedError(409, "You already created this model repo", more=there)
        new = Repository(private=wanted.get("visibility") == "private")
        new.commit("main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
        self.server.repositories[repo] = new
        return there

    def validate(self) -> Any:
        content = json.loads(self.body)["content"]
        if not isinstance(yaml.safe_load(content.split("---")[1]), dict):
            raise RefusedError(400, "no metadata")
        return {"errors": [], "warnings": []}

    def info(self, repo: str, revision: str = "main") -> Any:
        found, commit = self.commit_of(repo, revision)
        files = [{"rfilename": path} for path in found.commits[commit]]
        return {"id": repo, "sha": commit, "private": found.private, "siblings": files}

    def tree(self, repo: str, revision: str) -> Any:
        found, commit = self.commit_of(repo, revision)
        entries = []
        for path, data in found.commits[commit].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            oid = hashlib.sha256(data).hexdigest()
            lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
            entries.append(entry | (lfs if oid in self.server.blobs else {}))
        return entries

    def branch(self, repo: str, revision: str) -> Any:
        found = self.repository(repo, write=True)
        if revision in found.branches:
            raise RefusedError(409, "Reference already exists")
        found.branches[revision] = found.branches["main"]
        return {}

    def preupload(self, repo: str, revision: str) -> Any:
        found, commit = self.commit_of(repo, revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["size"] >= self.server.lfs_from else "regular"
            there = found.commits[commit].get(file["path"])
            oid = None if there is None else git_oid(there)
            modes.append({"path": file["path"], "uploadMode": mode, "oid": oid})
        return {"files": [{**mode, "shouldIgnore": False} for mode in modes]}

    def lfs_batch(self, repo: str) -> Any:
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{ENDPOINT}/lfs/{wanted['oid']}"
            if wanted["size"] > self.server.largest:
                objects.append(wanted | {"error": {"code": 413, "message": "file too large"}})
            else:
                objects.append(wanted | {"actions": {"upload": {"href": href}}})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        pull_request = "create_pr" in self.query
        found, parent = self.commit_of(repo, revision)
        self.repository(repo, write=not pull_request and not revision.startswith("refs/pr/"))
        if len(self.body) > self.server.largest:
            raise RefusedError(413, "payload too large")
        files = dict(found.commits[parent])
        message = ""
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            match key:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        url = {}
        if pull_request:
            number = self.discuss(repo)["num"]
            revision = f"refs/pr/{number}"
            url = {"pullRequestUrl": f"{ENDPOINT}/{repo}/discussions/{number}"}
        name = found.commit(revision, files, message)
        return {"commitUrl": f"{ENDPOINT}/{repo}/commit/{name}", "commitOid": name} | url

    def discuss(self, repo: str) -> Any:
        found = self.repository(repo)
        number = 1 + sum(branch.startswith("refs/pr/") for branch in found.branches)
        found.branches[f"refs/pr/{number}"] = found.branches["main"]
        return {"num": number}

    def discussion(self, repo: str, number: str) -> Any:
        return {
            "title": "",
            "num": int(number),
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "draft",
            "repo": {"name": repo, "type": "model"},
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
        }

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        found, commit = self.commit_of(repo, revision)
        if found.gated and self.user != repo.partition("/")[0]:
            raise RefusedError(403, "Access to this model is restricted", "GatedRepo")
        if path not in found.commits[commit]:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        data = found.commits[commit][path]
        return data, {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": commit}


def git_oid(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", MODEL, Handler.info),
    ("GET", rf"{MODEL}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{MODEL}/tree/(?P<revision>.+)", Handler.tree),
    ("POST", rf"{MODEL}/branch/(?P<revision>.+)", Handler.branch),
    ("POST", rf"{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"{MODEL}/discussions", Handler.discuss),
    ("GET", rf"{MODEL}/discussions/(?P<number>\d+)", Handler.discussion),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_upload),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


class Diverted(httpx.BaseTransport):
    """Diverts requests from the hub to its stand-in; there may be no others."""

    def __init__(self, hub: HubStandIn) -> None:
        self.hub = hub
        self.transport = httpx.HTTPTransport(trust_env=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert str(request.url).startswith(f"{ENDPOINT}/")
        url = request.url.copy_with(scheme="http", host="127.0.0.1", port=self.hub.server_port)
        diverted = httpx.Request(
            request.method,
            url,
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions,
        )
        return self.transport.handle_request(diverted)

    def close(self) -> None:
        self.transport.close()


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A stand-in that this process takes for the hub while the context lasts."""
    with HubStandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        hooks = {"request": [hf_request_event_hook]}
        set_client_factory(
            lambda: httpx.Client(
                transport=Diverted(hub), event_hooks=hooks, follow_redirects=True, timeout=30
            )
        )
        try:
            yield hub
        finally:
            set_client_factory(default_client_factory)
            hub.shutdown()
            thread.join()
