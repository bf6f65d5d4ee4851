"""A W&B server on loopback: just enough of its GraphQL, file-stream and storage endpoints for a run to be made,
filled, finished and read back by the real client. Written against wandb 0.31.0.

``WandbStub().start()`` gives a server whose ``url`` goes into WANDB_BASE_URL. ``behaviour`` can be changed while it
runs: 'ok'; an HTTP status (401, 500, ...) for every request; 'hang', which accepts and never answers; 'drop files',
which takes uploads and forgets them. ``operations_say`` gives single GraphQL operations a status or 'hang', ``storage_says``
single files, by the end of their path, ``stream_says`` what is logged; ``delay`` is what every answer takes, in seconds. A stopped server can be started again, on the same port, with what it had.
"""

import base64
import gzip
import json
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "stub-entity"


class WandbStub:
    def __init__(self, behaviour: str | int = "ok", verbose: bool = False) -> None:
        self.behaviour = behaviour
        self.operations_say: dict[str, str | int] = {}
        self.storage_says: dict[str, str | int] = {}
        self.stream_says: str | int = "ok"
        self.verbose = verbose
        self.delay = 0.0
        self.port = 0
        self.runs: dict[str, dict] = {}
        self.artifacts: list[dict] = []
        self.storage: dict[str, bytes] = {}
        self.used: list[tuple[str, str]] = []
        self.keys: set[str] = set()
        self.operations: list[str] = []
        self.bodies: list[bytes] = []
        self.released = threading.Event()
        self.lock = threading.RLock()

    def start(self) -> "WandbStub":
        stub = self

        class Handler(_Handler):
            server_stub = stub

        self.released.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "WandbStub":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, name: str) -> dict:
        return self.runs.setdefault(
            name,
            {"name": name, "history": [], "summary": {}, "config": {}, "files": [], "exitcode": None, "group": None},
        )

    # GraphQL operations by name; what they return is what wandb 0.31.0 asks for.

    def op_Viewer(self, _: dict) -> dict:
        return {
            "viewer": {
                "id": "viewer",
                "entity": ENTITY,
                "username": "stub-user",
                "email": "stub@example.invalid",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    def op_UpsertBucket(self, v: dict) -> dict:
        inserted = v["name"] not in self.runs
        run = self.run(v["name"])
        run["project"] = v.get("project") or run.get("project")
        for key, source in (("group", "groupName"), ("display", "displayName"), ("job_type", "jobType")):
            run[key] = v.get(source) or run.get(key)
        if v.get("config"):
            run["config"].update(json.loads(v["config"]))
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def op_RunResumeStatus(self, v: dict) -> dict:
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": None}
        bucket = self._bucket(run) | {
            "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
            "eventsTail": "[]",
            "notes": None,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        project = {"id": "project", "name": run["project"], "entity": {"id": "entity", "name": ENTITY}}
        return {"model": project | {"bucket": bucket}}

    def _find(self, reference: str) -> dict | None:
        """The artifact that 'name:alias' or 'name:v0' means, with or without 'entity/project/'."""
        name, _, version = reference.rpartition("/")[2].partition(":")
        for artifact in reversed(self.artifacts):
            if artifact["name"] == name and version in (*artifact["aliases"], f"v{artifact['version']}"):
                return artifact
        return None

    def _bucket(self, run: dict) -> dict:
        return {
            "id": "bucket-" + run["name"],
            "name": run["name"],
            "displayName": run.get("display") or run["name"],
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "project": {"id": "project", "name": run["project"], "entity": {"id": "entity", "name": ENTITY}},
            "historyLineCount": len(run["history"]),
        }

    def op_CreateRunFiles(self, v: dict) -> dict:
        files = [
            {"name": f, "uploadUrl": f"{self.url}/storage/run/{v['run']}/{urllib.parse.quote(f)}"} for f in v["files"]
        ]
        return {"createRunFiles": {"runID": "bucket-" + v["run"], "uploadHeaders": [], "files": files}}

    def op_ServerFeaturesQuery(self, _: dict) -> dict:
        return {"serverInfo": {"features": []}}

    def op_OrganizationCoreWeaveOrganizationID(self, _: dict) -> dict:
        return {"entity": {"organization": None}}

    # Artifacts: create, name the files of the manifest, upload, commit.

    def op_ArtifactType(self, v: dict) -> dict:
        found = self._find(v["name"])
        return {"project": {"artifact": {"artifactType": {"name": found["type"]}} if found else None}}

    def op_CreateArtifact(self, v: dict) -> dict:
        given = v["input"]
        name = given["artifactCollectionName"]
        versions = [a for a in self.artifacts if a["name"] == name]
        aliases = [a["alias"] for a in given["aliases"]]
        for other in versions:
            other["aliases"] = [a for a in other["aliases"] if a not in aliases]
        artifact = {
            "id": f"artifact-{len(self.artifacts)}",
            "name": name,
            "type": given["artifactTypeName"],
            "version": len(versions),
            "aliases": aliases,
            "state": "PENDING",
            "digest": given["digest"],
            "run": given["runName"],
            "project": given["projectName"],
            "metadata": given["metadata"],
            "files": [],
        }
        self.artifacts.append(artifact)
        latest = {"id": versions[-1]["id"]} if versions else None
        created = {"id": artifact["id"], "state": "PENDING", "artifactSequence": {"latestArtifact": latest}}
        return {"createArtifact": {"artifact": created}}

    def op_CreateArtifactManifest(self, v: dict) -> dict:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(v["artifactID"], v["includeUpload"])}}

    def op_UpdateArtifactManifest(self, v: dict) -> dict:
        artifact = v["artifactManifestID"].removeprefix("manifest-")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(artifact, v["includeUpload"])}}

    def _manifest(self, artifact: str, upload: bool) -> dict:
        file = {"id": f"manifest-file-{artifact}"}
        if upload:
            file |= {"uploadUrl": f"{self.url}/storage/{artifact}/wandb_manifest.json", "uploadHeaders": []}
        return {"id": f"manifest-{artifact}", "file": file}

    def op_CreateArtifactFiles(self, v: dict) -> dict:
        nodes = []
        for spec in v.get("artifactFiles") or v["input"]["artifactFiles"]:
            artifact, name = spec["artifactID"], spec["name"]
            next(a for a in self.artifacts if a["id"] == artifact)["files"].append(name)
            nodes.append(
                {
                    "id": f"file-{artifact}-{name}",
                    "name": name,
                    "displayName": name,
                    "storagePath": f"wandb_artifacts/{artifact}/{name}",
                    "uploadUrl": f"{self.url}/storage/{artifact}/{urllib.parse.quote(name)}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": artifact},
                }
            )
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def op_CommitArtifact(self, v: dict) -> dict:
        artifact = next(a for a in self.artifacts if a["id"] == v["artifactID"])
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def op_ArtifactByID(self, v: dict) -> dict:
        return {"artifact": self._artifact(next(a for a in self.artifacts if a["id"] == v["id"]))}

    def _artifact(self, artifact: dict) -> dict:
        project = {"id": "project", "internalId": "1", "name": artifact["project"], "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project}
        return {
            "__typename": "Artifact",
            "id": artifact["id"],
            "artifactSequence": collection,
            "versionIndex": artifact["version"],
            "artifactType": {"name": artifact["type"]},
            "description": None,
            "metadata": artifact["metadata"],
            "ttlDurationSeconds": -1,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": artifact["state"],
            "size": 1,
            "digest": artifact["digest"],
            "commitHash": "0" * 20,
            "fileCount": len(artifact["files"]),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
            "aliases": [
                {"__typename": "ArtifactAlias", "id": alias, "alias": alias, "artifactCollection": collection}
                for alias in artifact["aliases"]
            ],
        }

    def op_GetArtifactMembershipFileUrls(self, v: dict) -> dict:
        artifact = self._find(f"{v['collection']}:{v['alias']}")
        edges = [
            {
                "node": {
                    "__typename": "File",
                    "name": name,
                    "directUrl": f"{self.url}/storage/{artifact['id']}/{urllib.parse.quote(name)}",
                }
            }
            for name in artifact["files"]
        ]
        page = {"__typename": "PageInfo", "endCursor": "", "hasNextPage": False}
        membership = {"files": {"pageInfo": page, "edges": edges}}
        return {"project": {"artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": membership}}}

    # What wandb.Api asks when a run is read back.

    def op_GetDefaultEntity(self, _: dict) -> dict:
        return {"viewer": {"id": "viewer", "entity": ENTITY}}

    def op_Run(self, v: dict) -> dict:
        run = self.runs.get(v["name"])
        if run is None or run.get("project") != v["project"]:
            return {"project": {"run": None}}
        node = {
            "id": "bucket-" + run["name"],
            "projectId": "1",
            "tags": [],
            "name": run["name"],
            "displayName": run.get("display"),
            "sweepName": None,
            "state": "finished" if run["exitcode"] == 0 else "running" if run["exitcode"] is None else "failed",
            "config": json.dumps(run["config"]),
            "group": run["group"],
            "jobType": run.get("job_type"),
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "description": None,
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]),
            "user": {"name": "stub", "username": "stub-user"},
            "historyKeys": {"lastStep": len(run["history"]) - 1, "keys": {}},
        }
        return {"project": {"run": node}}

    def op_RunSampledHistory(self, v: dict) -> dict:
        rows = self.runs[v["name"]]["history"]
        found = []
        for spec in v["specs"]:
            keys = json.loads(spec)["keys"]
            found.append([{key: row[key] for key in keys} for row in rows if all(key in row for key in keys)])
        return {"project": {"run": {"sampledHistory": found}}}

    def op_RunFiles(self, v: dict) -> dict:
        run, wanted = v["name"], v.get("fileNames") or []
        prefix = f"run/{run}/"
        names = [path.removeprefix(prefix) for path in self.storage if path.startswith(prefix)]
        names = [name for name in names if not wanted or name in wanted]
        edges = [
            {
                "cursor": name,
                "node": {
                    "id": name,
                    "name": name,
                    "url": f"{self.url}/storage/{prefix}{urllib.parse.quote(name)}",
                    "directUrl": f"{self.url}/storage/{prefix}{urllib.parse.quote(name)}",
                    "sizeBytes": len(self.storage[prefix + name]),
                    "mimetype": "",
                    "updatedAt": "2026-01-01T00:00:00Z",
                    "md5": "",
                },
            }
            for name in names
        ]
        files = {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}
        return {"project": {"internalId": "1", "run": {"fileCount": len(names), "files": files}}}

    def op_ArtifactMembershipByName(self, v: dict) -> dict:
        artifact = self._find(v["name"])
        if artifact is None:
            return {"project": {"artifactCollectionMembership": None}}
        node = self._artifact(artifact)
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "member-" + artifact["id"],
            "versionIndex": artifact["version"],
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [{key: alias[key] for key in ("__typename", "id", "alias")} for alias in node["aliases"]],
            "artifactCollection": node["artifactSequence"],
            "artifact": node,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def op_FetchArtifactManifest(self, v: dict) -> dict:
        file = {"directUrl": f"{self.url}/storage/{v['id']}/wandb_manifest.json"}
        return {"artifact": {"currentManifest": {"file": file}}}

    def op_UseArtifact(self, v: dict) -> dict:
        artifact = next(a for a in self.artifacts if a["id"] == v["artifactID"])
        self.used.append((v["runName"], f"{artifact['name']}:v{artifact['version']}"))
        node = self._artifact(artifact)
        keys = ("id", "digest", "description", "state", "createdAt", "metadata")
        return {"useArtifact": {"artifact": {key: node[key] for key in keys}}}


def _operation(request: dict) -> str:
    return request.get("operationName") or request["query"].split("(")[0].split("{")[0].split()[-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_stub: WandbStub

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        stub = self.server_stub
        if stub.released.is_set():  # stopped: connections that were kept alive end too
            self.close_connection = True
            return
        body = self._body()
        behaviour = stub.behaviour
        if self.path == "/graphql" and behaviour == "ok":
            behaviour = stub.operations_say.get(_operation(json.loads(body)), behaviour)
        if self.path.endswith("/file_stream") and behaviour == "ok":
            behaviour = stub.stream_says
        if self.path.startswith("/storage/") and behaviour == "ok":
            behaviour = stub.storage_says.get(self.path.rpartition("/")[2], behaviour)
        if behaviour == "hang":
            stub.released.wait(600)
            self.close_connection = True
            return
        stub.released.wait(stub.delay)
        if isinstance(behaviour, int):
            self._send(behaviour, b'{"errors": [{"message": "stub says no"}]}')
            return
        with stub.lock:
            stub.bodies.append(body)
            auth = self.headers.get("Authorization", "")
            if auth.startswith("Basic "):
                stub.keys.add(base64.b64decode(auth[6:]).decode().partition(":")[2])
            if self.path == "/graphql":
                self._graphql(json.loads(body))
            elif self.path.startswith("/storage/"):
                self._storage(body)
            elif self.path.endswith("/file_stream"):
                self._file_stream(json.loads(body))
            else:
                self._send(200, b"{}")

    def _graphql(self, request: dict) -> None:
        stub = self.server_stub
        name = _operation(request)
        stub.operations.append(name)
        operation = getattr(stub, "op_" + name, None)
        if stub.verbose:
            print(
                "GRAPHQL",
                name,
                json.dumps(request.get("variables"))[:1000],
                "" if operation else "UNKNOWN " + request["query"],
                file=sys.stderr,
                flush=True,
            )
        if operation is None:
            self._send(200, json.dumps({"data": None, "errors": [{"message": f"unknown operation {name}"}]}).encode())
            return
        answer = operation(request.get("variables") or {})
        if stub.verbose:
            print("   ->", json.dumps(answer)[:600], file=sys.stderr, flush=True)
        self._send(200, json.dumps({"data": answer}).encode())

    def _storage(self, body: bytes) -> None:
        stub = self.server_stub
        path = urllib.parse.unquote(self.path.removeprefix("/storage/"))
        if stub.verbose:
            print(self.command, path, len(body), file=sys.stderr, flush=True)
        if self.command == "PUT":
            if stub.behaviour != "drop files":
                stub.storage[path] = body
            self._send(200, b"")
        elif path in stub.storage:
            self._send(200, stub.storage[path], "application/octet-stream")
        else:
            self._send(404, b"")

    def _file_stream(self, request: dict) -> None:
        stub = self.server_stub
        run = stub.run(self.path.split("/")[-2])
        for name, chunk in (request.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                lines = [json.loads(line) for line in chunk["content"]]
                run["history"][chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
        if request.get("complete"):
            run["exitcode"] = request.get("exitcode")
        self._send(200, b"{}")

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def log_message(self, *_: object) -> None:
        pass
