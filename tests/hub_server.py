"""A server on this machine that answers `huggingface_hub` and diffusers as the real Hub does.

It holds model repositories and Spaces of one user with one branch; a Space is kept as `spaces/USER/NAME`. Clients take
its address from `HF_ENDPOINT`, which they read when they are imported, so that each has to run in a process of its
own; those that are forked from one process share an address, at which one server after the other may listen. Weights
go by LFS, for which clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

USER, TOKEN = "me", "hf_goodtoken"
DROP = 0  # stands for a status, and closes the connection without an answer

REPO = r"(?P<repo>(spaces/)?[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|spaces)/(?P<repo>[^/]+/[^/]+)"
ROUTES = [  # matched before unquoting, as a quoted revision may hold slashes
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET|HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


@dataclass
class Commit:
    oid: str
    title: str
    changed: set[str]  # paths
    files: dict[str, bytes]  # all that the repository held then


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    pull_requests: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def commit(
        self, title: str, changes: dict[str, bytes], deleted: Iterable[str] = (), pull_request: bool = False
    ) -> Commit:
        files = {**(self.files if self.commits else {}), **changes}
        for path in deleted:
            del files[path]
        history = self.pull_requests if pull_request else self.commits
        oid = hashlib.sha1(repr((len(history), pull_request, title, files)).encode()).hexdigest()
        history.append(Commit(oid, title, {*changes, *deleted}, files))
        return history[-1]

    def at(self, revision: str | None) -> Commit:
        for number, commit in enumerate(self.pull_requests, 1):
            if revision == f"refs/pr/{number}":
                return commit
        for commit in [*self.commits, *self.pull_requests]:
            if commit.oid == revision:
                return commit
        if revision not in (None, "main"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[-1]


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class HubServer(ThreadingHTTPServer):
    """The server; use it by `with listen() as listening, HubServer(listening).running() as server`."""

    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname(), _Handler, bind_and_activate=False)
        self.listening = listening
        self.server_port = listening.getsockname()[1]
        self.url = url_of(listening)
        # The storage has another origin, as the real Hub's has: clients must not send it the token.
        self.storage_url = f"http://localhost:{self.server_port}"
        self.repos: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[tuple[str, str]] = []  # (name in ROUTES, path)
        self.delays: dict[str, float] = {}  # name in ROUTES -> seconds before each of its answers
        self.role = "write"  # of the token
        self.failures: dict[str, list[int]] = defaultdict(list)  # name in ROUTES -> statuses of its next answers

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        self.socket.close()
        self.socket = self.listening.dup()  # which this server closes when it ends
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


def listen() -> socket.socket:
    """Returns a socket at a free port of this machine, for one server or for several, one after the other."""
    return socket.create_server(("127.0.0.1", 0), backlog=16)


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def is_lfs(path: str, content_size: int) -> bool:
    return path.endswith(".safetensors") or content_size > 10_000_000


def git_blob(path: str, content: bytes) -> bytes:
    """Returns what git keeps of a file: the content, or a pointer to it if it is on LFS."""
    if not is_lfs(path, len(content)):
        return content
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()


def git_oid(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


def describe(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Returns a file or a folder as `tree` and `paths-info` list it."""
    if path not in files:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    content, blob = files[path], git_blob(path, files[path])
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(blob)}
    if is_lfs(path, len(content)):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": len(blob)}
    return entry


def folders(files: dict[str, bytes]) -> set[str]:
    return {path[: match.start()] for path in files for match in re.finditer("/", path)}


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.1 keeps connections, so that every body has to be read and every answer needs a length.
    protocol_version = "HTTP/1.1"
    server: HubServer
    repo: str = ""  # id of the repository that the request is for

    def answer(self) -> None:
        raw_path, _, query = self.path.partition("?")
        self.query, self.body = parse_qs(query), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = [
            (name, re.fullmatch(pattern, raw_path)) for methods, pattern, name in ROUTES if self.command in methods
        ]
        name, match = next((route for route in found if route[1]), ("unknown", None))
        self.server.requests.append((name, raw_path))
        time.sleep(self.server.delays.get(name, 0))
        try:
            if self.server.failures[name]:
                raise HubError(self.server.failures[name].pop(0), "Something went wrong on our side")
            if match is None:
                raise HubError(404, f"this server has no {self.command} {raw_path}")
            arguments = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
            is_space = arguments.pop("kind", "") == "spaces"
            self.repo = ("spaces/" if is_space else "") + arguments.pop("repo", "")
            getattr(self, name)(**arguments)
        except HubError as error:
            self.send_error_as_hub(error)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args: Any) -> None:  # pytest would print it
        pass

    def send_bytes(self, content: bytes, status: int = 200, **headers: str | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, content: bytes, **headers: str) -> None:
        """Sends a whole file, or the part that the request's `Range` names."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self.send_bytes(content, Accept_Ranges="bytes", **headers)
            return
        start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise HubError(416, "Range Not Satisfiable")
        content_range = f"bytes {start}-{stop - 1}/{len(content)}"
        self.send_bytes(content[start:stop], 206, Content_Range=content_range, **headers)

    def send_json(self, answer: Any, status: int = 200, **headers: str | None) -> None:
        self.send_bytes(json.dumps(answer).encode(), status, Content_Type="application/json", **headers)

    def send_error_as_hub(self, error: HubError) -> None:
        if error.status == DROP:
            self.close_connection = True
            return
        headers = {"X_Error_Code": error.code, "X_Error_Message": str(error)}
        if error.code == "EntryNotFound":  # the clients remember by commit what is not there
            headers["X_Repo_Commit"] = self.server.repos[self.repo].commits[-1].oid
        self.send_json(error.body, error.status, **headers)

    def check_token(self, required: bool = True) -> bool:
        token = self.headers.get("Authorization")
        if token is not None and token != f"Bearer {TOKEN}":  # the Hub refuses a wrong one even where none is needed
            raise HubError(401, "Invalid credentials in Authorization header")
        if token is None and required:
            raise HubError(401, "Invalid username or password.")
        return token is not None

    def repository(self, write: bool = False) -> Repository:
        known = self.check_token(required=write)
        repository = self.server.repos.get(self.repo)
        if repository is None or (repository.private and not known):
            # Strangers get 401, so that they can't tell private repositories from missing ones.
            message = "Repository not found" if known else "Invalid username or password."
            raise HubError(404 if known else 401, message, "RepoNotFound")
        return repository

    def whoami(self) -> None:
        self.check_token()
        access_token = {"displayName": "test", "role": self.server.role}
        self.send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": access_token}})

    def create(self) -> None:
        self.check_token()
        options = json.loads(self.body)
        owner = options.get("organization") or USER
        if owner != USER:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{options['name']}"
        if options.get("type") == "space":
            if options.get("sdk") != "gradio":
                raise HubError(400, '"sdk" is required')
            name = f"spaces/{name}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise HubError(409, "You already created this model repo", url=url)
        private = options.get("visibility") == "private" or options.get("private", False)  # new and old clients
        self.server.repos[name] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.server.repos[name].commit("initial commit", {".gitattributes": attributes})
        self.send_json({"url": url, "name": name.removeprefix("spaces/")})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if content.startswith("---") and len(content.split("---")) < 3:
            errors = [{"message": "Invalid metadata in README.md."}]
            raise HubError(400, errors[0]["message"], errors=errors, warnings=[])
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, revision: str) -> None:
        held = self.repository(write=True).at(revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], is_lfs(file["path"], file["size"])
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if path in held:
                sha256 = hashlib.sha256(held[path]).hexdigest()
                files[-1]["oid"] = sha256 if is_lfs(path, len(held[path])) else git_oid(held[path])
        self.send_json({"files": files})

    def lfs_batch(self) -> None:
        self.repository(write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.server.lfs_objects:
                upload = {"href": f"{self.server.storage_url}/lfs/{entry['oid']}"}
                verify = {"href": f"{self.server.url}/{self.repo}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
        self.send_json({"transfer": "basic", "objects": objects})

    def check_storage_request(self) -> None:
        if "Authorization" in self.headers:  # S3 refuses a token, as its addresses are signed
            raise HubError(400, "Only one auth mechanism allowed")

    def lfs_upload(self, oid: str) -> None:
        self.check_storage_request()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have this SHA-256")
        self.server.lfs_objects[oid] = self.body
        self.send_bytes(b"")

    def lfs_download(self, oid: str) -> None:
        self.check_storage_request()
        if oid not in self.server.lfs_objects:
            raise HubError(404, "No such object")
        self.send_file(self.server.lfs_objects[oid], ETag=f'"{oid}"')

    def lfs_verify(self) -> None:
        self.repository(write=True)
        claimed = json.loads(self.body)
        if len(self.server.lfs_objects.get(claimed["oid"], b"")) != claimed["size"]:
            raise HubError(404, "No such object of this size")
        self.send_json({})

    def commit(self, revision: str) -> None:
        repository = self.repository(write=True)
        parent, title = repository.at(revision), ""
        changes, deleted = {}, []
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    raise HubError(412, "The parent commit is not the head of the branch any more")
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.lfs_objects:
                    raise HubError(400, f"{value['path']} was not uploaded to LFS")
                changes[value["path"]] = self.server.lfs_objects[value["oid"]]
            elif key == "deletedFile":
                if value["path"] not in parent.files:
                    raise HubError(400, f"{value['path']} is not there to be deleted")
                deleted.append(value["path"])
        pull_request = self.query.get("create_pr") == ["1"]
        oid = repository.commit(title, changes, deleted, pull_request).oid
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{self.repo}/commit/{oid}"}
        if pull_request:
            number = len(repository.pull_requests)
            answer["pullRequestUrl"] = f"{self.server.url}/{self.repo}/discussions/{number}"
        self.send_json(answer)

    def info(self, revision: str | None) -> None:
        repository = self.repository()
        commit = repository.at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        id = self.repo.removeprefix("spaces/")
        owner, state = id.split("/")[0], {"private": repository.private, "gated": False, "disabled": False}
        names = {"id": id, "modelId": id, "author": owner, "sha": commit.oid}
        self.send_json({**names, **state, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, revision: str, path: str | None) -> None:
        files = self.repository().at(revision).files
        prefix = f"{path}/" if path else ""
        below = sorted(p for p in {*files, *folders(files)} if p.startswith(prefix))
        if path and not below:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = [p for p in below if "/" not in p.removeprefix(prefix)]
        self.send_json([describe(p, files) for p in below])

    def paths_info(self, revision: str) -> None:
        files = self.repository().at(revision).files
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.send_json([describe(p, files) for p in asked if p in files or p in folders(files)])

    def resolve(self, revision: str, path: str) -> None:
        commit = self.repository().at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        if not is_lfs(path, len(content)):
            self.send_file(content, X_Repo_Commit=commit.oid, ETag=f'"{git_oid(content)}"')
            return
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        location = f"{self.server.storage_url}/lfs/{oid}"
        self.send_bytes(b"", 302, X_Repo_Commit=commit.oid, ETag=f'"{oid}"', Location=location, **linked)
