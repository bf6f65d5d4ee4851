"""A stand-in for the Hugging Face hub, for the real huggingface_hub code: HF_ENDPOINT is set to its address.

with serve(REPOSITORIES) as hub:
    hub.faults["owner/name"] = Fault("file", cut=True)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/name"})
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_thetokenthatisaccepted"


@dataclass
class Fault:
    """What goes wrong at one address of a repository.

    at: 'info' (the repository's description), 'tree' (its list of files), 'head' (what a file is), 'file' (its bytes),
    or 'all'. status: the answer. silent: no answer. cut: the connection is closed after half of the file; with
    ``ranges`` the rest can be asked for, and is cut again. stall: half of the file, then nothing. pause: seconds
    between pieces of the file. body: what is answered in place of everything, with status 200. times: how many requests
    it spoils; then all is well.
    """

    at: str
    status: int = 0
    code: str = ""
    message: str = ""
    silent: bool = False
    cut: bool = False
    ranges: bool = False
    stall: bool = False
    pause: float = 0.0
    pieces: int = 10
    body: bytes | None = None
    times: int = 10**9


class Hub(ThreadingHTTPServer):
    """repositories: name -> commit -> path -> bytes. branches: (name, branch) -> commit; 'main' is SHA unless set.

    private: names for which TOKEN is needed. faults: name -> Fault. asked: 'METHOD path' of every request.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {name: {SHA: files} for name, files in repositories.items()}
        self.branches: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.faults: dict[str, Fault] = {}
        self.asked: list[str] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:  # a client that went away
        pass


class _Handler(BaseHTTPRequestHandler):
    """The four addresses that a download needs, as huggingface_hub 2 asks for them."""

    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.reply(
            status, **({"X_Error_Code": code} if code else {}), **({"X_Error_Message": message} if message else {})
        )

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            parts = parts[1:]
        name, rest = "/".join(parts[1:3]), parts[3:]
        at = {"tree": "tree", "resolve": "head" if self.command == "HEAD" else "file"}.get(
            rest[0] if rest else "", "info"
        )
        fault = self.server.faults.get(name)
        if fault is not None and fault.at not in (at, "all"):
            fault = None
        if fault is not None:
            if fault.times <= 0:
                fault = None
            else:
                fault.times -= 1
        if fault is not None and fault.silent:
            self.server.stopped.wait(300)
            return
        if fault is not None and fault.status:
            self.refuse(fault.status, fault.code, fault.message)
            return
        if fault is not None and fault.body is not None:
            self.reply(200, fault.body, Content_Type="text/html")
            return
        self.answer(name, rest, fault)

    def answer(self, name: str, rest: list[str], fault: Fault | None) -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        commits = self.server.repositories.get(name)
        if commits is None or (name in self.server.private and given is None):
            # The hub does not tell a private repository from one that does not exist.
            return self.refuse(401 if given is None else 404, "RepoNotFound", "Repository not found")
        asked = rest[1] if len(rest) > 1 else "main"
        commit = (
            asked if asked in commits else self.server.branches.get((name, asked), SHA if asked == "main" else None)
        )
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = commits[commit]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in files.items()
            ]
            return self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        if rest[:1] == ["resolve"]:
            return self.send_file(files["/".join(rest[2:])], commit, fault)
        siblings = [{"rfilename": path} for path in files]
        info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": []}
        return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_file(self, content: bytes, commit: str, fault: Fault | None) -> None:
        headers = {"X_Repo_Commit": commit, "ETag": f'"{_oid(content)}"'}
        if fault is None or self.command == "HEAD":
            return self.reply(200, content, **headers)
        start = 0
        if fault.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        rest = content[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if fault.cut or fault.stall:
            self.wfile.write(rest[: (len(rest) + 1) // 2])
            self.wfile.flush()
            if fault.stall:
                self.server.stopped.wait(300)
            self.close_connection = True
            return None
        size = -(-len(rest) // fault.pieces)
        for at in range(0, len(rest), size):
            self.wfile.write(rest[at : at + size])
            self.wfile.flush()
            time.sleep(fault.pause)
        return None


def _oid(content: bytes) -> str:
    """Git's name of a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.stopped.set()
            hub.shutdown()


_CODE = """
import json, sys, time
from stoney_rl import data
data.HUB_TIMEOUT, data.HUB_TRIES = 1.0, 2
for call in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        rowset = data.load_rows(**call)
        found = {"questions": [row.question for row in rowset.rows], "sources": [row.source for row in rowset.rows],
                 "bad": [bad.line for bad in rowset.quarantine], "revision": rowset.revision, "notes": rowset.notes,
                 "metadata": [row.metadata for row in rowset.rows]}
    except data.StoneyError as error:
        found = {"error": str(error)}
    print(json.dumps({**found, "seconds": time.monotonic() - start}), flush=True)
"""


def environment(home: Path, endpoint: str, **env: str) -> dict[str, str]:
    """An environment in which ``endpoint`` is the hub and ``home`` its cache, and nothing else of the hub is set."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    hub = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    return {**kept, **hub, "PYTHONPATH": str(ROOT), **env}


def load_in_process(home: Path, endpoint: str, *calls: dict, **env: str) -> list[dict]:
    """What each ``load_rows(**call)`` gives in a process whose hub is ``endpoint`` and whose cache is ``home``.

    A process of its own, since huggingface_hub reads its environment when it is imported. Its patience is one second, twice.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(calls)],
        cwd=ROOT,
        env=environment(home, endpoint, **env),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for result in results:
        result["stderr"] = done.stderr
        assert "\n" not in result.get("error", "")
    return results
