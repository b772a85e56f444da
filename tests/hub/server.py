"""The Hub's endpoints for uploading and downloading models, in memory: repositories, commits, LFS and tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

REPO = r"([\w.-]+/[\w.-]+)"
MODEL_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
LICENSE = re.compile(r"[a-z0-9.-]+")
FRONT_MATTER = re.compile(r"---\n(.*?)\n---", re.DOTALL)


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        log = self.branches.setdefault(branch, [])
        state = json.dumps([branch, len(log), message, {name: blob.oid for name, blob in files.items()}])
        log.append(Commit(hashlib.sha1(state.encode()).hexdigest(), message, files))
        return log[-1]


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class LocalHub:
    """A server to use as a context manager; `url` is its HF_ENDPOINT.

    Attributes:
        repositories: All repositories by name.
        lfs: Contents of all LFS files by their SHA-256.
        upload_mode: "lfs" or "regular": how safetensors files have to be sent.
        read_only: Answer 403 to everything that writes, as to a token without write access.
        cuts: How many of the next requests of a kind ("commit", "put") to break off halfway.
        unknown: Requests to endpoints that this server does not have.
    """

    user, token = "user", "hf_local"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.upload_mode = "lfs"
        self.read_only = False
        self.cuts: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def messages(self, name: str, branch: str = "main") -> list[str]:
        """Messages of a branch's commits, without the first, empty one."""
        return [commit.message for commit in self.repositories[name].branches[branch][1:]]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return {path: blob.data for path, blob in self.repositories[name].branches[branch][-1].files.items()}

    def find(self, name: str, revision: str) -> Commit:
        if name not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        branches = self.repositories[name].branches
        if revision in branches:
            return branches[revision][-1]
        for commit in (commit for log in branches.values() for commit in log):
            if commit.oid == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, body: dict) -> dict:
        name = f"{body.get('organization') or self.user}/{body['name']}"
        if not name.startswith(f"{self.user}/"):
            raise Refusal(403, f"You don't have the rights to create a model under {name.split('/')[0]}")
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository(private=body.get("visibility") == "private")
        self.repositories[name].commit("main", "initial commit", {})
        return {"url": f"{self.url}/{name}", "name": name}

    def branch(self, body: dict, name: str, branch: str) -> dict:
        if branch in self.repositories[name].branches:
            raise Refusal(409, "Reference already exists")
        self.repositories[name].branches[branch] = list(self.repositories[name].branches["main"])
        return {}

    def validate_card(self, body: dict) -> dict:
        match = FRONT_MATTER.match(body["content"])
        data = (yaml.safe_load(match[1]) if match else None) or {}
        names = [data.get("base_model") or "none", *(data.get("datasets") or [])]
        wrong = [name for name in names if not MODEL_ID.fullmatch(name)]
        errors = [{"message": f"{name!r} is not the name of a repository on the Hub"} for name in wrong]
        if not LICENSE.fullmatch(data.get("license", "none")):
            errors.append({"message": f"{data['license']!r} is not a license"})
        if errors:
            raise Refusal(400, "Invalid metadata", errors=errors, warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, body: dict, name: str, revision: str) -> dict:
        known = self.find(name, revision).files
        files = []
        for path in (entry["path"] for entry in body["files"]):
            mode = self.upload_mode if path.endswith(".safetensors") else "regular"
            oid = known[path].oid if path in known and not known[path].lfs else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, body: dict, name: str) -> dict:
        objects = []
        for entry in body["objects"]:
            actions = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
            objects.append({**entry, **({} if entry["oid"] in self.lfs else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content does not have the announced SHA-256")
        self.lfs[oid] = body
        return {}

    def lfs_verify(self, body: dict) -> dict:
        if len(self.lfs.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "The file has not arrived")
        return {}

    def commit(self, body: list[dict], name: str, revision: str) -> dict:
        files = dict(self.find(name, revision).files)
        header, *operations = body
        for value in (entry["value"] for entry in operations if entry["key"] == "file"):
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        for value in (entry["value"] for entry in operations if entry["key"] == "lfsFile"):
            files[value["path"]] = Blob(self.lfs[value["oid"]], lfs=True)
        commit = self.repositories[name].commit(revision, header["value"]["summary"], files)
        return {"commitUrl": f"{self.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}

    def info(self, body: dict, name: str, revision: str = "main") -> dict:
        commit = self.find(name, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.oid, "siblings": siblings, "tags": [], "private": False}

    def tree(self, body: dict, name: str, revision: str, folder: str = "") -> list[dict]:
        files = {path: blob for path, blob in self.find(name, revision).files.items() if path.startswith(folder)}
        if folder and not files:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return [{"type": "file", "path": p, "size": len(b.data), "oid": b.oid} for p, b in files.items()]

    def resolve(self, body: dict, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self.find(name, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return blob.data, headers


READS = {
    rf"/api/models/{REPO}": LocalHub.info,
    rf"/api/models/{REPO}/revision/(.+)": LocalHub.info,
    rf"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?": LocalHub.tree,
    rf"/{REPO}/resolve/([^/]+)/(.+)": LocalHub.resolve,
}
WRITES = {
    r"/api/repos/create": LocalHub.create,
    r"/api/validate-yaml": LocalHub.validate_card,
    rf"/api/models/{REPO}/branch/(.+)": LocalHub.branch,
    rf"/api/models/{REPO}/preupload/(.+)": LocalHub.preupload,
    rf"/api/models/{REPO}/commit/(.+)": LocalHub.commit,
    rf"/{REPO}\.git/info/lfs/objects/batch": LocalHub.lfs_batch,
    r"/lfs/(\w+)": LocalHub.lfs_put,
    r"/verify": LocalHub.lfs_verify,
}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, checks its token, and sends what the hub answers."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        writes = self.command in ("POST", "PUT")
        kind = "put" if self.command == "PUT" else "commit" if "/commit/" in path else "other"
        body = self.read_body(kind)
        if body is None:
            return
        try:
            self.send(200, self.find_answer(WRITES if writes else READS, path, body))
        except Refusal as refusal:
            self.send(refusal.status, (json.dumps(refusal.body).encode(), refusal.headers))

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def find_answer(self, routes: dict, path: str, body: bytes) -> Any:
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                # LFS links carry their own permission in the real Hub, so the client sends no token there.
                name = match[1] if REPO in pattern else None
                self.check_token(name, routes is WRITES and not path.startswith("/lfs/"))
                arguments = [group for group in match.groups() if group is not None]
                return answer(self.hub, self.parse(body, answer), *arguments)
        self.hub.unknown.append(f"{self.command} {path}")
        raise Refusal(404, f"This stand-in has no {self.command} {path}")

    def parse(self, body: bytes, answer: Any) -> Any:
        if answer is LocalHub.lfs_put:
            return body
        lines = [json.loads(line) for line in body.splitlines()]
        return lines if answer is LocalHub.commit else lines[0] if lines else {}

    def check_token(self, name: str | None, writes: bool) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(name or "")
        if token and token != self.hub.token:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if not token and (writes or (repository and repository.private)):
            raise Refusal(401, "Invalid username or password.")
        if writes and self.hub.read_only:
            raise Refusal(403, "You don't have write access to this repository")

    def read_body(self, kind: str) -> bytes | None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.cuts[kind] <= 0:
            return self.rfile.read(length)
        self.hub.cuts[kind] -= 1
        self.rfile.read(length // 2)
        # Closing with a linger time of zero resets the connection, as a line that breaks would.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        return None

    def send(self, status: int, answer: Any) -> None:
        data, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""
