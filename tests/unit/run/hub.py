"""A stand-in of the hub's HTTP interface on loopback, as far as an upload needs it."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """`repos`: name -> {"private", "files"}; `bases`: models of others, name -> license. Accepts one token."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.bases: dict[str, str] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, code: int, value: Any = None, **headers: str) -> None:
                content = json.dumps(value if value is not None else {}).encode()
                self.send_response(code)
                for name, said in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(content)),
                    **headers,
                }.items():
                    self.send_header(name.replace("_", "-"), said)
                self.end_headers()
                self.wfile.write(content)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    found = b""
                    while size := int(self.rfile.readline(), 16):
                        found += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return found
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_GET(self) -> None:
                name = self.path.split("?")[0].removeprefix("/api/models/")
                if name in hub.repos:
                    return self.answer(200, {"id": name, "private": hub.repos[name]["private"], "siblings": []})
                if name in hub.bases:
                    return self.answer(200, {"id": name, "private": False, "cardData": {"license": hub.bases[name]}})
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

            def do_PUT(self) -> None:
                hub.blobs[self.path.rpartition("/")[2]] = self.body()
                self.answer(200)

            def do_POST(self) -> None:
                content, path = self.body(), self.path.split("?")[0]
                hub.seen.append(path)
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
                if path == "/api/repos/create":
                    asked = json.loads(content)
                    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                    if name in hub.repos:
                        return self.answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                    private = asked.get("private", asked.get("visibility") == "private")  # huggingface_hub 1, and 2
                    hub.repos[name] = {"private": private, "files": {}}
                    return self.answer(200, {"url": f"{hub.url}/{name}"})
                if path == "/api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
                    files = [
                        {"path": one["path"], "shouldIgnore": False}
                        | {"uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                        for one in json.loads(content)["files"]
                    ]
                    return self.answer(200, {"files": files})
                if path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        one | {"actions": {"upload": {"href": f"{hub.url}/put/{one['oid']}"}}}
                        for one in json.loads(content)["objects"]
                    ]
                    return self.answer(200, {"transfer": "basic", "objects": objects})
                if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                    for line in map(json.loads, content.splitlines()):
                        value = line["value"]
                        if line["key"] == "file":
                            hub.repos[found[1]]["files"][value["path"]] = base64.b64decode(value["content"])
                        elif line["key"] == "lfsFile":
                            hub.repos[found[1]]["files"][value["path"]] = hub.blobs[value["oid"]]
                    address = f"{hub.url}/{found[1]}/commit/1"
                    return self.answer(200, {"success": True, "commitUrl": address, "commitOid": "1" * 40})
                self.answer(500, {"error": path})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
