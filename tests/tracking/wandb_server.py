"""As much of a W&B server as its client needs to write runs, artifacts and reports, and to read runs back.

Prints its port, appends every request's body to argv[1]. argv[2] is the HTTP status of its answers. It keeps what it is
sent, and tells it under /kept as JSON.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

PROJECT = {"id": "project", "internalId": "7", "name": "concord", "entityName": "team", "entity": {"name": "team"}}
PAGE = {"endCursor": None, "hasNextPage": False}

runs: dict[str, dict[str, Any]] = {}
files: dict[str, bytes] = {}  # by <run>/<name>
artifacts: list[dict[str, Any]] = []
reports: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with Path(sys.argv[1]).open("ab") as file:
            file.write(body + b"\n")
        reply = self.reply(unquote(self.path), body)
        self.send_response(int(sys.argv[2]))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer  # noqa: N815  # http.server finds them by these names

    def reply(self, path: str, body: bytes) -> bytes:
        if path == "/graphql":
            return json.dumps(graphql(json.loads(body))).encode()
        if path == "/kept":
            return json.dumps(kept()).encode()
        if path.startswith("/upload/"):
            files[path.removeprefix("/upload/")] = body
        if path.startswith("/download/"):
            return files[path.removeprefix("/download/")]
        if path.endswith("/file_stream"):
            stream(runs[path.split("/")[4]], json.loads(body))
        return b"{}"

    def log_message(self, *args: Any) -> None:
        pass


def stream(run: dict[str, Any], content: dict[str, Any]) -> None:
    """What a run sends on its way: rows of history, its summary, and that it is over."""
    for name, part in (content.get("files") or {}).items():
        if name == "wandb-history.jsonl":
            run["history"][part["offset"] :] = part["content"]
        if name == "wandb-summary.json":
            run["summaryMetrics"] = part["content"][-1]
    if content.get("complete"):
        run["state"] = "failed" if content.get("exitcode") else "finished"


def graphql(request: dict[str, Any]) -> dict[str, Any]:
    if sys.argv[2] == "401":
        return {"errors": [{"message": "user is not logged in"}]}
    found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
    name = found[1][0].upper() + found[1][1:] if found else ""
    answer = ANSWERS.get(name)
    return {"data": {} if answer is None else answer(request.get("variables") or {})}


def viewer(asked: dict[str, Any]) -> dict[str, Any]:
    return {"viewer": {"id": "viewer", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}


def upsert_run(asked: dict[str, Any]) -> dict[str, Any]:
    run = runs.setdefault(asked["name"], new_run(asked))
    sent = ("config", "displayName", "jobType", "tags", "summaryMetrics")
    run |= {key: asked[key] for key in sent if asked.get(key) is not None}
    run["group"] = asked.get("groupName") or run["group"]
    bucket = {key: run[key] for key in ("id", "name", "displayName", "config", "historyLineCount")}
    return {"upsertBucket": {"bucket": bucket | {"project": PROJECT}, "inserted": True}}


def new_run(asked: dict[str, Any]) -> dict[str, Any]:
    fixed = dict.fromkeys(("commit", "description", "notes", "systemMetrics", "createdAt", "heartbeatAt"))
    return fixed | {
        "id": f"bucket-{asked['name']}",
        "name": asked["name"],
        "displayName": asked["name"],
        "config": "{}",
        "group": None,
        "jobType": None,
        "tags": [],
        "user": {"name": "me", "username": "me"},
        "sweepName": asked.get("sweep"),
        "state": "running",
        "readOnly": False,
        "projectId": "7",
        "historyLineCount": 0,
        "summaryMetrics": "{}",
        "history": [],
    }


def create_run_files(asked: dict[str, Any]) -> dict[str, Any]:
    address = f"{here()}/upload/{asked['run']}/"
    made = [{"name": name, "uploadUrl": address + name} for name in asked["files"]]
    return {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": made}}


def find_runs(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["project"] != "concord":
        return {"project": None}
    group = json.loads(asked["filters"])["group"]
    nodes = [{"cursor": name, "node": shown(run)} for name, run in runs.items() if run["group"] == group]
    listed = {"runCount": len(nodes), "readOnly": False, "runs": {"edges": nodes, "pageInfo": PAGE}}
    return {"project": PROJECT | listed}


def shown(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "history"}


def find_run(asked: dict[str, Any]) -> dict[str, Any]:
    return {"project": {"run": shown(runs[asked["name"]])}}


def history_keys(asked: dict[str, Any]) -> dict[str, Any]:
    rows = runs[asked["name"]]["history"]
    return {"project": {"run": {"historyKeys": {"lastStep": json.loads(rows[-1])["_step"] if rows else -1}}}}


def history_page(asked: dict[str, Any]) -> dict[str, Any]:
    steps = range(asked["minStep"], asked["maxStep"])
    rows = runs[asked["run"]]["history"]
    return {"project": {"run": {"history": [row for row in rows if json.loads(row)["_step"] in steps]}}}


def run_files(asked: dict[str, Any]) -> dict[str, Any]:
    wanted = asked.get("fileNames")
    names = [path.partition("/")[2] for path in files if path.startswith(f"{asked['name']}/")]
    nodes = [file_node(asked["name"], name) for name in names if not wanted or name in wanted]
    listed = {"fileCount": len(nodes), "files": {"edges": nodes, "pageInfo": PAGE}}
    return {"project": {"internalId": "7", "run": listed}}


def file_node(run: str, name: str) -> dict[str, Any]:
    address = f"{here()}/download/{run}/{name}"
    about = {"id": name, "name": name, "url": address, "directUrl": address, "sizeBytes": len(files[f"{run}/{name}"])}
    return {"cursor": name, "node": about | {"mimetype": "", "updatedAt": None, "md5": None}}


def create_artifact(asked: dict[str, Any]) -> dict[str, Any]:
    artifacts.append(asked["input"])
    made = {"id": f"artifact-{len(artifacts)}", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
    return {"createArtifact": {"artifact": made}}


def create_manifest(asked: dict[str, Any]) -> dict[str, Any]:
    upload = {"id": "file", "uploadUrl": f"{here()}/upload/{asked['artifactID']}/manifest", "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": asked["artifactID"], "file": upload}}}


def update_manifest(asked: dict[str, Any]) -> dict[str, Any]:
    name = asked["artifactManifestID"]
    upload = {"id": "file", "uploadUrl": f"{here()}/upload/{name}/manifest", "uploadHeaders": []}
    return {"updateArtifactManifest": {"artifactManifest": {"id": name, "file": upload}}}


def create_artifact_files(asked: dict[str, Any]) -> dict[str, Any]:
    nodes = []
    for file in asked["input"]["artifactFiles"]:
        path = f"{file['artifactID']}/{file['name']}"
        about = {"storagePath": path, "uploadUrl": f"{here()}/upload/{path}", "uploadHeaders": []}
        nodes.append({"node": about | {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}})
    return {"createArtifactFiles": {"files": {"edges": nodes}}}


def upsert_view(asked: dict[str, Any]) -> dict[str, Any]:
    reports.append(asked)
    view = {"id": "view1", "type": asked["type"], "name": asked["name"], "displayName": asked["displayName"]}
    view |= {"description": asked["description"], "project": PROJECT, "spec": asked["spec"], "updatedAt": None}
    return {"upsertView": {"view": view, "inserted": True}}


def projects(asked: dict[str, Any]) -> dict[str, Any]:
    node = PROJECT | {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
    return {"models": {"edges": [{"node": node, "cursor": "1"}], "pageInfo": PAGE}}


def kept() -> dict[str, Any]:
    contents = [content.decode(errors="replace") for content in files.values()]
    return {"runs": runs, "artifacts": artifacts, "reports": reports, "contents": contents}


def here() -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


ANSWERS = {
    "Viewer": viewer,
    "GetDefaultEntity": viewer,
    "UpsertBucket": upsert_run,
    "CreateRunFiles": create_run_files,
    "Runs": find_runs,
    "Run": find_run,
    "RunFiles": run_files,
    "RunHistoryKeys": history_keys,
    "RunParquetHistory": lambda asked: {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}},
    "HistoryPage": history_page,
    "ArtifactType": lambda asked: {"project": {"artifact": None}},
    "CreateArtifact": create_artifact,
    "CreateArtifactManifest": create_manifest,
    "UpdateArtifactManifest": update_manifest,
    "CreateArtifactFiles": create_artifact_files,
    "CommitArtifact": lambda asked: {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}},
    "UpsertView": upsert_view,
    "ProjectInternalId": lambda asked: {"project": PROJECT if asked["projectName"] == "concord" else None},
    "GetProjects": projects,
    "Projects": projects,
}


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave connections behind when they end."""


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
