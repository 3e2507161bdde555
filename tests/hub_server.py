"""A hub on loopback: as much of the Hugging Face hub's HTTP interface as its real clients use to fetch models and data.

Repositories are folders below a root, in the hub's own layout and under their own names:

    models/Qwen/Qwen1.5-0.5B/config.json ...        datasets/openai/gsm8k/main/test-00000-of-00001.parquet ...

    with HubServer(root) as hub:
        environment = {"HF_ENDPOINT": hub.url, ...}

A client reads HF_ENDPOINT when it is imported, so tests start a process for it. Faults are switched on and off: `gated`
(repositories that need a token), `dropped` (file -> bytes after which the connection breaks, each time), `refusing`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


class HubServer:
    """url: what HF_ENDPOINT takes; requests: what was asked, as "METHOD path"."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.gated: set[str] = set()
        self.dropped: dict[str, int] = {}
        self.requests: list[str] = []
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def commit(self, kind: str, name: str) -> str:
        """The revision: of the content, so that it changes with it."""
        folder = self.folder(kind, name)
        told = [f"{p.relative_to(folder)} {_digest(p)}" for p in _files(folder)]
        return hashlib.sha1("\n".join(told).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _large(path: Path) -> bool:
    """What the hub keeps beside git: its ETag is the sha256, by which the client's cache names the file."""
    return path.suffix in (".safetensors", ".parquet", ".gz")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        self._answer(self.rfile.read(length))

    def _answer(self, body: bytes = b"") -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\S.*))?", path):
            kind, name, rest = found.groups()
            return self._api(kind, name, rest or "", query, body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if found.group(1) else "models"
            return self._file(kind, *found.groups()[1:])
        return self._json({"error": "Not Found"}, 404)

    def _missing(self, kind: str, name: str, revision: str) -> bool:
        """Answers for a repository that is not there, may not be read, or lacks the revision."""
        if not self.hub.folder(kind, name).is_dir():
            self._json({"error": "Repository not found"}, 401 if not self._token else 404, "RepoNotFound")
        elif name in self.hub.gated and self._token != TOKEN:
            text = f"Access to {kind[:-1]} {name} is restricted. You must have access to it and be authenticated."
            self._json({"error": text}, 403 if self._token else 401, "GatedRepo", text)
        elif revision not in ("main", self.hub.commit(kind, name)):
            self._json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
        else:
            return False
        return True

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()

    def _api(self, kind: str, name: str, rest: str, query: dict, body: bytes) -> None:
        verb, _, tail = rest.partition("/")
        revision, _, below = tail.partition("/")
        known = self.hub.folder(kind, name).is_dir()
        if verb in ("", "revision") and known and (not revision or revision == "main"):
            pass  # what a gated repository is about, everybody may know; its files not
        elif self._missing(kind, name, revision or "main"):
            return None
        if verb in ("", "revision"):
            if self._missing(kind, name, revision or "main") if not known else False:
                return None
            return self._json(self._told(kind, name))
        folder = self.hub.folder(kind, name)
        if verb == "tree":
            base = folder / below if below else folder
            if not base.is_dir():
                return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(base.rglob("*")) if deep else sorted(base.iterdir())
            return self._json([self._entry(p, folder) for p in found])
        if verb == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            paths = [folder / p for p in ([wanted] if isinstance(wanted, str) else wanted)]
            return self._json([self._entry(p, folder) for p in paths if p.exists()])
        return self._json({"error": "Not Found"}, 404)

    def _told(self, kind: str, name: str) -> dict:
        folder = self.hub.folder(kind, name)
        return {"_id": "0", "id": name, "modelId": name, "sha": self.hub.commit(kind, name), "private": False,
                "gated": "manual" if name in self.hub.gated else False, "disabled": False, "tags": [], "downloads": 0,
                "likes": 0, "lastModified": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
                "siblings": [{"rfilename": str(p.relative_to(folder))} for p in _files(folder)]}

    def _entry(self, path: Path, folder: Path) -> dict:
        relative = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "oid": hashlib.sha1(relative.encode()).hexdigest(), "size": 0,
                    "path": relative}
        size, digest = path.stat().st_size, _digest(path)
        lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if _large(path) else {}
        return {"type": "file", "oid": digest[:40], "size": size, "path": relative, **lfs}

    def _file(self, kind: str, name: str, revision: str, relative: str) -> None:
        if self._missing(kind, name, revision):
            return None
        path = self.hub.folder(kind, name) / relative
        if not path.is_file():
            return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        data, digest = path.read_bytes(), _digest(path)
        start, total = 0, len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(found.group(1))
            data = data[start:int(found.group(2)) + 1 if found.group(2) else None]
        self.send_response(206 if start or len(data) < total else 200)
        headers = {"Content-Length": len(data), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream",
                   "ETag": f'"{digest if _large(path) else digest[:40]}"', "X-Repo-Commit": self.hub.commit(kind, name),
                   "Content-Disposition": f'inline; filename="{path.name}"'}
        if _large(path):
            headers |= {"X-Linked-Size": total, "X-Linked-ETag": f'"{digest}"'}
        if start or len(data) < total:
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if (most := self.hub.dropped.get(relative)) is not None and start + len(data) > most:
            self.wfile.write(data[:max(0, most - start)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(data)

    def _json(self, value: object, status: int = 200, code: str = "", message: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message or str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
