"""A Hugging Face Hub on this machine: as much of its HTTP interface as its own client asks for with datasets' files."""

import base64
import hashlib
import http.server
import json
from urllib.parse import unquote, urlparse


class Hub(http.server.ThreadingHTTPServer):
    """Repositories of datasets by name, each with its files; what is binary is kept as a blob, as the Hub does."""

    # Clients keep their connections.
    daemon_threads = True

    def __init__(self, *repositories):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {name: {} for name in repositories}
        self.blobs = {}
        self.commits = []
        self.put = []
        """Digests of uploaded blobs, in order."""
        self.fail = lambda method, path: False
        self.keep = lambda data: data
        """What becomes of the bytes of a small file."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(405)

    def do_PUT(self):
        data = self.body()
        if self.server.fail("PUT", self.path):
            return self.answer(403)
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.server.blobs[digest] = data
        self.server.put.append(digest)
        return self.answer(200)

    def do_GET(self):
        url = urlparse(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "datasets" and parts[3:5] == ["resolve", "main"]:
            return self.resolve("/".join(parts[1:3]), "/".join(parts[5:]))
        assert parts[:2] == ["api", "datasets"], self.path
        repository, rest = "/".join(parts[2:4]), parts[4:]
        if repository not in self.server.files:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest[:2] == ["tree", "main"]:
            return self.tree(repository, "/".join(rest[2:]), recursive="recursive=True" in url.query.replace("t", "T"))
        return self.answer(200, {"id": repository, "sha": "0" * 40})

    def do_POST(self):
        data = self.body()
        if self.server.fail("POST", self.path):
            return self.answer(403)
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[-1] == "batch":
            return self.batch(json.loads(data))
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            found = [(file["path"], base64.b64decode(file["sample"])) for file in json.loads(data)["files"]]
            files = [
                {"path": path, "uploadMode": "lfs" if b"\0" in sample else "regular", "shouldIgnore": False}
                for path, sample in found
            ]
            return self.answer(200, {"files": files})
        assert parts[4] == "commit", self.path
        return self.commit(repository, [json.loads(line) for line in data.splitlines()])

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status, content=None, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def batch(self, asked):
        objects = []
        for one in asked["objects"]:
            known = one["oid"] in self.server.blobs
            upload = {"upload": {"href": f"{self.server.url}/blobs/{one['oid']}"}}
            objects.append({**one} if known else {**one, "actions": upload})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository, lines):
        new = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                new[value["path"]] = (self.server.blobs[value["oid"]], True)
            else:
                assert line["key"] == "file"
                new[value["path"]] = (self.server.keep(base64.b64decode(value["content"])), False)
        self.server.files[repository] |= new
        self.server.commits.append(sorted(new))
        return self.answer(
            200, {"commitUrl": f"{self.server.url}/datasets/{repository}/commit/1", "commitOid": "1" * 40}
        )

    def tree(self, repository, folder, *, recursive):
        prefix = f"{folder}/" if folder else ""
        below = {path: at for path, at in self.server.files[repository].items() if path.startswith(prefix)}
        if folder and not below:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        entries = {}
        for path, (data, is_blob) in below.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, 2):
                if len(parts) > depth:
                    name = prefix + "/".join(parts[:depth])
                    entries[name] = {"type": "directory", "oid": "2" * 40, "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = _entry(path, data, is_blob)
        return self.answer(200, list(entries.values()))

    def resolve(self, repository, path):
        if path not in self.server.files.get(repository, {}):
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = self.server.files[repository][path][0]
        wanted = self.headers["Range"]
        if wanted is None:
            return self.answer(200, data)
        start, stop = wanted.removeprefix("bytes=").split("-")
        return self.answer(206, data[int(start) : int(stop) + 1 if stop else None])


def _entry(path, data, is_blob):
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "oid": oid, "size": len(data), "path": path}
    if is_blob:
        digest = hashlib.sha256(data).hexdigest()
        entry |= {"oid": "3" * 40, "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
    return entry
