"""A hub in memory that speaks the hub's protocol over HTTP, for the real huggingface_hub client.

A repository is a list of commits, each a dict from path to bytes, and names (branches, tags) for them. Clients are
started with the environment of `LocalHub.environment`: the endpoint must be known before huggingface_hub is imported.
"""

import base64
import hashlib
import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_localtoken"
USER = "someone"
LARGE = (".safetensors", ".parquet")  # sent through LFS
PULL_REQUEST = "refs/pr/"  # the branch of a pull request is named by this and its number


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """`names` maps branches and tags to commits; every commit can be found by its own hash as well."""

    commits: list[Commit]
    branches: dict[str, Commit]
    tags: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        by_hash = {commit.oid: commit for commit in self.commits}
        return self.branches.get(revision) or self.tags.get(revision) or by_hash.get(revision)


class Refused(Exception):
    """An answer that is an error: status, the hub's code for it, and a message."""


NO_REPO = Refused(404, "RepoNotFound", "Repository not found")


class LocalHub:
    """`with LocalHub() as hub:` serves at `hub.url`."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}  # by type ("models", "datasets") and id
        self.objects: dict[str, bytes] = {}  # LFS objects by hash
        self.interrupt = 0  # the process to interrupt in the middle of its next large upload
        self.interrupted = ""  # that upload: Python drops an interrupt that comes at the end of an object's life
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For a client process whose caches lie below `home`."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        return inherited | settings

    # -- requests: each takes (query, body, groups of its path) and returns what is sent as JSON ---------------------

    def create(self, query, body):
        sent = json.loads(body)
        name = f"{sent.get('organization') or USER}/{sent['name'].split('/')[-1]}"
        key = (sent.get("type", "model") + "s", name)
        if key in self.repositories:
            raise Refused(409, "", "You already created this repo", {"url": f"{self.url}/{name}", "id": name})
        first = Commit(hashlib.sha1(repr(key).encode()).hexdigest(), "initial commit", {".gitattributes": b""})
        self.repositories[key] = Repository([first], {"main": first})
        return {"url": f"{self.url}/{'datasets/' if key[0] == 'datasets' else ''}{name}", "id": name}

    def delete(self, query, body):
        sent = json.loads(body)
        name = f"{sent.get('organization') or USER}/{sent['name'].split('/')[-1]}"
        if self.repositories.pop((sent.get("type", "model") + "s", name), None) is None:
            raise NO_REPO
        return {}

    def validate_yaml(self, query, body):
        header = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError as reason:
            raise Refused(400, "", f"Invalid metadata in README.md: {reason}") from None
        return {"errors": [], "warnings": []}

    def whoami(self, query, body):
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def preupload(self, query, body, kind, name, revision):
        self.commit_of(kind, name, revision)
        paths = [entry["path"] for entry in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes)]}

    def lfs_batch(self, query, body, datasets, name):
        answers = []
        for wanted in json.loads(body)["objects"]:
            actions = {}
            if wanted["oid"] not in self.objects:
                actions = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
                actions["verify"] = {"href": f"{self.url}/lfs-verify/{wanted['oid']}"}
            answers.append(wanted | ({"actions": actions} if actions else {}))
        return {"transfer": "basic", "objects": answers}

    def lfs_verify(self, query, body, oid):
        if len(self.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(400, "", "the object was not uploaded")
        return {}

    def commit(self, query, body, kind, name, revision):
        repository, parent = self.repository(kind, name), self.commit_of(kind, name, revision)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files, title = dict(parent.files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    raise Refused(412, "", "A commit has happened since")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"LFS object {value['oid']} does not exist")
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        identity = repr((parent.oid, title, sorted((p, hashlib.sha1(d).hexdigest()) for p, d in files.items())))
        new = Commit(hashlib.sha1(identity.encode()).hexdigest(), title, files)
        repository.commits.append(new)
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{url}/commit/{new.oid}"}
        if "1" in query.get("create_pr", []):
            number = 1 + sum(branch.startswith(PULL_REQUEST) for branch in repository.branches)
            revision = f"{PULL_REQUEST}{number}"
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        repository.branches[revision] = new
        return answer

    def info(self, query, body, kind, name, revision="main"):
        found = self.commit_of(kind, name, revision)
        text = found.files.get("README.md", b"").decode()
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        card = yaml.safe_load(header[1]) if header else None
        date = "2026-01-01T00:00:00.000Z"
        return {
            "_id": "0" * 24, "id": name, "modelId": name, "sha": found.oid, "private": False, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": date, "createdAt": date,
            "cardData": card, "siblings": [{"rfilename": path} for path in sorted(found.files)],
        }  # fmt: skip

    def tree(self, query, body, kind, name, revision, path=""):
        found, path = self.commit_of(kind, name, revision), path.strip("/")
        inside = {p: d for p, d in found.files.items() if not path or p.startswith(path + "/")}
        if path and not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        entries, folders = [], set()
        for name_, data in sorted(inside.items()):
            deeper = name_[len(path) :].strip("/").split("/")
            base = f"{path}/" if path else ""
            folders |= {base + "/".join(deeper[:n]) for n in range(1, len(deeper))}
            if "true" in query.get("recursive", []) or len(deeper) == 1:
                entries.append(self.entry(name_, data))
        if "true" not in query.get("recursive", []):
            folders = {folder for folder in folders if "/" not in folder[len(path) :].strip("/")}
        return entries + [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]

    def paths_info(self, query, body, kind, name, revision):
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = parse_qs(body.decode())["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        files = self.commit_of(kind, name, revision).files
        return [self.entry(path, files[path]) for path in wanted if path in files]

    def entry(self, path: str, data: bytes) -> dict:
        answer = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(LARGE):
            answer["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return answer

    def refs(self, query, body, kind, name):
        repository = self.repository(kind, name)
        return {
            "branches": [
                _ref("heads", n, c) for n, c in repository.branches.items() if not n.startswith(PULL_REQUEST)
            ],
            "tags": [_ref("tags", n, c) for n, c in repository.tags.items()],
            "converts": [],
        }

    def commits(self, query, body, kind, name, revision):
        history = self.repository(kind, name).commits
        date = "2026-01-01T00:00:00.000Z"
        return [{"id": c.oid, "title": c.title, "message": "", "date": date, "authors": []} for c in history[::-1]]

    def make_branch(self, query, body, kind, name, branch):
        repository = self.repository(kind, name)
        if branch in repository.branches:
            raise Refused(409, "", "Reference already exists")
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        repository.branches[branch] = self.commit_of(kind, name, start)
        return {}

    def make_tag(self, query, body, kind, name, revision):
        repository, tag = self.repository(kind, name), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, "", "Tag reference exists already")
        repository.tags[tag] = self.commit_of(kind, name, revision)
        return {}

    def interrupt_process(self, query, body, process):
        self.interrupt, self.interrupted = int(process), ""
        return {}

    def repository(self, kind: str, name: str) -> Repository:
        if (kind, name) not in self.repositories:
            raise NO_REPO
        return self.repositories[kind, name]

    def commit_of(self, kind: str, name: str, revision: str) -> Commit:
        found = self.repository(kind, name).find(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found


def _ref(kind: str, name: str, commit: Commit) -> dict:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.oid}


ID = "([^/]+/[^/]+)"
REPO = f"/api/(models|datasets)/{ID}"
ROUTES = [
    ("POST", "/api/repos/create", LocalHub.create),
    ("DELETE", "/api/repos/delete", LocalHub.delete),
    ("POST", "/api/validate-yaml", LocalHub.validate_yaml),
    ("GET", "/api/whoami-v2", LocalHub.whoami),
    ("POST", f"{REPO}/preupload/([^/]+)", LocalHub.preupload),
    ("POST", f"{REPO}/commit/([^/]+)", LocalHub.commit),
    ("POST", f"{REPO}/branch/([^/]+)", LocalHub.make_branch),
    ("POST", f"{REPO}/tag/([^/]+)", LocalHub.make_tag),
    ("POST", f"{REPO}/paths-info/([^/]+)", LocalHub.paths_info),
    ("GET", f"{REPO}/revision/([^/]+)", LocalHub.info),
    ("GET", f"{REPO}/refs", LocalHub.refs),
    ("GET", f"{REPO}/commits/([^/]+)", LocalHub.commits),
    ("GET", f"{REPO}/tree/([^/]+)(/.*)?", LocalHub.tree),
    ("GET", REPO, LocalHub.info),
    ("POST", f"/(datasets/)?{ID}\\.git/info/lfs/objects/batch", LocalHub.lfs_batch),
    ("POST", "/lfs-verify/([0-9a-f]{64})", LocalHub.lfs_verify),
    ("POST", "/interrupt/([0-9]+)", LocalHub.interrupt_process),
]
FILE = re.compile(f"/(datasets/)?{ID}/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_POST(self):
        self.answer()

    do_GET = do_HEAD = do_DELETE = do_POST

    def answer(self):
        address = urlsplit(self.path)
        body = self.body()
        try:
            self.check_token()
            file = FILE.fullmatch(address.path)
            if file and self.command in ("GET", "HEAD"):
                self.send_file(*(unquote(group or "") for group in file.groups()))
                return
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if method == self.command and match:
                    groups = [unquote(group or "") for group in match.groups()]
                    with self.hub.lock:
                        answer = function(self.hub, parse_qs(address.query), body, *groups)
                    self.send(200, json.dumps(answer).encode())
                    return
            raise Refused(404, "", f"no such address: {self.command} {address.path}")
        except Refused as refused:
            status, code, message, *rest = refused.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            content = (rest[0] if rest else {}) | {"error": message}
            self.send(status, json.dumps(content).encode(), headers)

    def check_token(self):
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if given is None and self.command not in ("GET", "HEAD") and "/lfs" not in self.path:
            raise Refused(401, "", "Unauthorized")

    def do_PUT(self):
        """A large file on its way up."""
        with self.hub.lock:
            self.hub.interrupted = self.hub.interrupted or self.path
            interrupted = self.hub.interrupt and self.hub.interrupted == self.path
        if interrupted:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            for _ in range(3):  # until the client has seen one; Python may drop it at the end of an object's life
                if self.hub.interrupt:
                    os.kill(self.hub.interrupt, signal.SIGINT)
                    time.sleep(3)  # else the broken connection is an error before the interrupt is
            self.close_connection = True
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != self.path.split("/")[-1]:
            self.send(400, b"", {"X-Error-Message": "another object than announced"})
            return
        self.hub.objects[self.path.split("/")[-1]] = data
        self.send(200, b"")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send_file(self, datasets: str, name: str, revision: str, path: str):
        commit = self.hub.commit_of("datasets" if datasets else "models", name, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = commit.files[path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": etag, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": etag}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = asked.groups()
            begin = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last) + 1, len(data)) if first and last else len(data)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self.send(206, data[begin:end], headers)
        else:
            self.send(200, data, headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        content = "application/json" if not headers or "ETag" not in headers else "application/octet-stream"
        for name, value in ({"Content-Type": content, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
