"""A server on this machine that speaks the Hub's protocol for models, and fails when it is told to."""

import hashlib
import itertools
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice"}
READ_ONLY = {"hf_reader"}
MEMBERS = {"atelier": {"alice"}}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".onnx")
DATE = "2026-01-01T00:00:00.000Z"


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]]


@dataclass
class Fault:
    """What the next `times` requests of this method and path meet; without any effect of its own, only `meanwhile`.

    Args:
        method: of the requests.
        path: a regular expression that is found in their paths.
        times: how often; infinity for ever.
        status: answer this, and do nothing else.
        headers: of that answer.
        drop: hang up after half of what is uploaded.
        cut: promise the whole file, and hang up after half of it.
        change: send this instead of the file.
        meanwhile: called before the request is looked at.
    """

    method: str
    path: str
    times: float = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    cut: bool = False
    change: Callable[[bytes], bytes] | None = None
    meanwhile: Callable[[], Any] | None = None


class Request(NamedTuple):
    """What one request says, once its body is read."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None


class Answer(NamedTuple):
    body: bytes
    headers: dict[str, str]
    status: int = 200


class Unsupported(Exception):  # noqa: N818 -- it is an answer, not an error
    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        commit = {"X-Repo-Commit": more.pop("commit")} if "commit" in more else {}
        self.answer = Answer(json.dumps({"error": message, **more}).encode(), {**headers, **commit}, status)


def blob_oid(content: bytes, path: str) -> str:
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """Repositories in memory, behind a server that lives as long as the context.

    Attributes:
        faults: what goes wrong, in order; the first that matches a request is used up by it.
        requests: method and path of all requests so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = False  # so that closing the server waits for their sockets
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # for tests

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what the last commit of a branch holds, without the file that every new repository has."""
        with self._lock:
            files = self._commit(self.repos[repo], revision).files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def messages(self, repo: str, branch: str = "main") -> list[str]:
        """Return the messages of the commits since the repository was made, oldest first."""
        with self._lock:
            return [commit.message for commit in self.repos[repo].branches[branch][1:]]

    def add(self, repo: str, files: Mapping[str, bytes], message: str = "by hand", *, private: bool = False) -> None:
        """Commit `files` to the main branch of `repo`, which is made if it is not there."""
        with self._lock:
            if repo not in self.repos:
                self.repos[repo] = Repo(
                    private, {"main": [self._new_commit("initial commit", {".gitattributes": b""})]}
                )
            commits = self.repos[repo].branches["main"]
            commits.append(self._new_commit(message, {**commits[-1].files, **files}))

    def _new_commit(self, message: str, files: dict[str, bytes]) -> Commit:
        return Commit(hashlib.sha1(str(next(self._numbers)).encode()).hexdigest(), message, files)

    # from request to answer

    def fault_of(self, method: str, path: str) -> Fault:
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return Fault(method, path)

    def answer(self, request: Request) -> Answer:
        with self._lock:
            try:
                if request.token is not None and request.token not in TOKENS:
                    raise Unsupported(401, "Invalid credentials in Authorization header")
                for method, pattern, handle in _ROUTES:
                    if method == request.method and (match := re.fullmatch(pattern, request.path)):
                        found = handle(self, request, *map(unquote, match.groups()))
                        return found if isinstance(found, Answer) else Answer(json.dumps(found).encode(), {})
                raise Unsupported(404, "Not Found")
            except Unsupported as refusal:
                return refusal.answer

    def _may_act_as(self, request: Request, namespace: str) -> bool:
        user = TOKENS.get(request.token or "")
        return user is not None and (user == namespace or user in MEMBERS.get(namespace, ()))

    def _readable(self, request: Request, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not self._may_act_as(request, repo_id.partition("/")[0])):
            raise Unsupported(404 if request.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, request: Request, repo_id: str) -> Repo:
        repo = self._readable(request, repo_id)
        self._require_rights(request, repo_id.partition("/")[0])
        return repo

    def _require_rights(self, request: Request, namespace: str) -> None:
        if request.token is None:
            raise Unsupported(401, "Invalid username or password.")
        if namespace not in MEMBERS and namespace not in TOKENS.values():
            raise Unsupported(404, "This organization does not exist")
        if request.token in READ_ONLY or not self._may_act_as(request, namespace):
            raise Unsupported(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _commit(self, repo: Repo, revision: str) -> Commit:
        if revision in repo.branches:
            return repo.branches[revision][-1]
        for commit in itertools.chain.from_iterable(repo.branches.values()):
            if commit.oid == revision:
                return commit
        raise Unsupported(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _whoami(self, request: Request) -> Any:
        if request.token is None:
            raise Unsupported(401, "Invalid username or password.")
        user = TOKENS[request.token]
        orgs = [{"type": "org", "name": name} for name, members in MEMBERS.items() if user in members]
        role = "read" if request.token in READ_ONLY else "write"
        return {"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": role}}}

    def _create(self, request: Request) -> Any:
        asked = request.json
        namespace = asked.get("organization") or TOKENS.get(request.token or "", "")
        self._require_rights(request, namespace)
        repo_id = f"{namespace}/{asked['name']}"
        place = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            raise Unsupported(409, "You already created this model repo", **place)
        self.add(repo_id, {}, private=asked.get("visibility") == "private")
        self.repos[repo_id].branches["main"].pop()
        return place

    def _create_branch(self, request: Request, repo_id: str, name: str) -> Any:
        repo = self._writable(request, repo_id)
        if name in repo.branches:
            raise Unsupported(409, "Reference already exists")
        start = self._commit(repo, request.json.get("startingPoint", "main"))
        branch = next(commits for commits in repo.branches.values() if start in commits)
        repo.branches[name] = branch[: branch.index(start) + 1]
        return {}

    def _refs(self, request: Request, repo_id: str) -> Any:
        branches = self._readable(request, repo_id).branches
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in branches.items()
        ]
        return {"branches": heads, "converts": [], "tags": []}

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Any:
        old = self._commit(self._writable(request, repo_id), revision).files
        files = []
        for file in request.json["files"]:
            path = file["path"]
            oid = {"oid": blob_oid(old[path], path)} if path in old else {}
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files}

    def _batch(self, request: Request, repo_id: str) -> Any:
        self._writable(request, repo_id)
        objects = []
        for asked in request.json["objects"]:
            href = {"href": f"{self.url}/lfs/{asked['oid']}"}
            actions = {} if asked["oid"] in self.objects else {"actions": {"upload": href, "verify": href}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **actions})
        return {"transfer": "basic", "objects": objects}

    def _put_object(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Unsupported(400, "What was uploaded has another hash")
        self.objects[oid] = request.body
        return {}

    def _verify_object(self, request: Request, oid: str) -> Any:
        if len(self.objects.get(oid, b"")) != request.json["size"]:
            raise Unsupported(400, "What was uploaded has another size")
        return {}

    def _post_commit(self, request: Request, repo_id: str, revision: str) -> Any:
        repo = self._writable(request, repo_id)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header, head = lines[0]["value"], self._commit(repo, revision)
        if header.get("parentCommit") not in (None, head.oid):
            raise Unsupported(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if key == "file":
                files[value["path"]] = b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Unsupported(400, f"There is no {value['path']} to commit")
        commit = self._new_commit(header["summary"], files)
        answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid}
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            repo.branches[f"refs/pr/{number}"] = [*repo.branches[revision], commit]
            return {**answer, "pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"}
        repo.branches[revision].append(commit)
        return answer

    def _info(self, request: Request, repo_id: str, revision: str = "main") -> Any:
        repo = self._readable(request, repo_id)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        flags = {"private": repo.private, "disabled": False, "gated": False}
        counts = {"downloads": 0, "likes": 0, "tags": []}
        dates = {"createdAt": DATE, "lastModified": DATE}
        names = {"id": repo_id, "modelId": repo_id, "author": repo_id.partition("/")[0], "sha": commit.oid}
        return {**names, **flags, **counts, **dates, "siblings": siblings}

    def _tree(self, request: Request, repo_id: str, revision: str) -> Any:
        files = self._commit(self._readable(request, repo_id), revision).files
        entries = []
        for path, content in files.items():
            oid = blob_oid(content, path)
            lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if path.endswith(LFS_SUFFIXES) else {}
            entries.append({"type": "file", "oid": oid[:40], "size": len(content), "path": path, **lfs})
        return entries

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._commit(self._readable(request, repo_id), revision)
        if path not in commit.files:
            raise Unsupported(404, "Entry not found", "EntryNotFound", commit=commit.oid)
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob_oid(content, path)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return Answer(content, headers)


_REPO, _PART = "([^/]+/[^/]+)", "([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", LoopbackHub._whoami),
    ("POST", "/api/validate-yaml", lambda hub, request: {"errors": [], "warnings": []}),
    ("POST", "/api/repos/create", LoopbackHub._create),
    ("POST", f"/api/models/{_REPO}/branch/{_PART}", LoopbackHub._create_branch),
    ("GET", f"/api/models/{_REPO}/refs", LoopbackHub._refs),
    ("POST", f"/api/models/{_REPO}/preupload/{_PART}", LoopbackHub._preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", LoopbackHub._batch),
    ("PUT", f"/lfs/{_PART}", LoopbackHub._put_object),
    ("POST", f"/lfs/{_PART}", LoopbackHub._verify_object),
    ("POST", f"/api/models/{_REPO}/commit/{_PART}", LoopbackHub._post_commit),
    ("GET", f"/api/models/{_REPO}", LoopbackHub._info),
    ("GET", f"/api/models/{_REPO}/revision/{_PART}", LoopbackHub._info),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}", LoopbackHub._tree),
    ("GET", f"/{_REPO}/resolve/{_PART}/(.+)", LoopbackHub._resolve),
    ("HEAD", f"/{_REPO}/resolve/{_PART}/(.+)", LoopbackHub._resolve),
]


class _Handler(BaseHTTPRequestHandler):
    """One connection a request: HTTP/1.0, so that no thread waits for a second one."""

    hub: LoopbackHub

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        fault = self.hub.fault_of(self.command, parts.path)
        if fault.drop:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return
        body = self._body()
        if fault.meanwhile is not None:
            fault.meanwhile()
        if fault.status is not None:
            page = f"<html>{fault.status}</html>".encode()  # as gateways do, which know no JSON
            self._send(Answer(page, fault.headers, fault.status))
            return
        answer = self.hub.answer(Request(self.command, parts.path, parse_qs(parts.query), self.headers, body))
        if fault.change is not None:
            answer = answer._replace(body=fault.change(answer.body))
        self._send(answer, len(answer.body) // 2 if fault.cut else None)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 -- the base class looks for these names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, end: int | None = None) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].partition("-")[0])
        ranged = start > 0 and answer.status == 200
        self.send_response(206 if ranged else answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}")
        self.send_header("Content-Length", str(len(answer.body) - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[start:end])
