"""A stand-in for the Hugging Face Hub on 127.0.0.1: repositories are made, files arrive whole or by LFS, commits count.

with FakeHub() as hub:
    ...                      # with HF_ENDPOINT=hub.url and HF_TOKEN=hub.token in the environment
    hub.files["me/model"]    # path -> bytes after the last commit
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`refuses`: how many uploads of large files end in status 403. commits: (repository, message) in their order."""

    token = "hf_of_the_tests"

    def __init__(self, refuses: int = 0):
        self.refuses = refuses
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.send(401, {"error": "Invalid username or password."})
                self.send(*hub.post(self.path.split("?")[0], content))

            def do_PUT(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if hub.refuses:
                    hub.refuses -= 1
                    return self.send(403, {"error": "Storage quota exceeded."})
                assert hashlib.sha256(content).hexdigest() == self.path.rsplit("/", 1)[1]
                hub.large[self.path.rsplit("/", 1)[1]] = content
                self.send(200, {})

            def send(self, status: int, answer: dict):
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def post(self, path: str, content: bytes) -> tuple[int, dict]:
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(repo, {})
            return 200, {"url": f"{self.url}/{repo}", "id": repo}
        if path.endswith("/objects/batch"):
            objects = json.loads(content)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        repo, what = "/".join(parts[2:4]), parts[4]
        if repo not in self.files:
            return 404, {"error": "Repository not found"}
        if what == "preupload":
            modes = {True: "lfs", False: "regular"}
            asked = json.loads(content)["files"]
            found = [{"path": file["path"], "size": file["size"]} for file in asked]
            for file in found:
                file |= {"uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            return 200, {"files": found}
        assert what == "commit", path
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repo, value["summary"]))
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
