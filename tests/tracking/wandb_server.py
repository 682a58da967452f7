"""As much of a W&B server as wandb-core needs for a run; prints its port, appends every request's body to argv[1].

argv[2] is the HTTP status of its answers.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = {
    "id": "bucket",
    "displayName": "name",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "project", "name": "concord", "entity": {"id": "entity", "name": "team"}},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with Path(sys.argv[1]).open("ab") as file:
            file.write(body + b"\n")
        reply = json.dumps(graphql(json.loads(body)) if self.path == "/graphql" else {}).encode()
        self.send_response(int(sys.argv[2]))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer  # noqa: N815  # http.server finds them by these names

    def log_message(self, *args: Any) -> None:
        pass


def graphql(request: dict[str, Any]) -> dict[str, Any]:
    if sys.argv[2] == "401":
        return {"errors": [{"message": "user is not logged in"}]}
    query, data = request["query"], {}
    if "upsertBucket" in query:
        data = {"upsertBucket": {"bucket": BUCKET | {"name": request["variables"]["name"]}, "inserted": True}}
    elif "viewer" in query:
        data = {"viewer": {"id": "viewer", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}
    elif "createRunFiles" in query:
        address = f"http://127.0.0.1:{server.server_address[1]}/upload/"
        files = [{"name": name, "uploadUrl": address + name} for name in request["variables"]["files"]]
        data = {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": files}}
    return {"data": data}


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
