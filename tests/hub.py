"""A stand-in for the Hugging Face hub on this machine: serves repositories from folders."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789" * 4


@contextlib.contextmanager
def serving(root):
    """Serves `root`/models/OWNER/NAME and `root`/datasets/OWNER/NAME; gives the address."""

    class Handler(_Handler):
        folder = root

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    """What `snapshot_download` and `load_dataset` ask: a commit, its files, and their content."""

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        if path.startswith("api/"):
            self._describe(*path.split("/")[1:])
        else:
            repository, _, rest = path.partition("/resolve/")
            kind = "" if repository.startswith("datasets/") else "models"
            self._deliver(self.folder / kind / repository / rest.partition("/")[2])

    do_HEAD = do_GET

    def log_message(self, *_):
        """Keeps quiet."""

    def _describe(self, kind, owner="", name="", question="", _="", *below):
        repository = self.folder / kind / owner / name
        if not (name and repository.is_dir()):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif question == "tree":
            found = repository.joinpath(*below)
            paths = found.rglob("*") if "recursive=true" in self.path else found.iterdir()
            entries = [
                {"type": "file", "path": str(p.relative_to(repository)), "size": p.stat().st_size}
                | {"oid": _digest(p.read_bytes())}
                if p.is_file()
                else {"type": "directory", "path": str(p.relative_to(repository)), "oid": COMMIT}
                for p in sorted(paths)
            ]
            self._answer(200, json.dumps(entries).encode(), {})
        else:
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "siblings": []}
            self._answer(200, json.dumps(about).encode(), {})

    def _deliver(self, file):
        if not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self._answer(200, content, {"ETag": _digest(content), "X-Repo-Commit": COMMIT})

    def _answer(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(content):
    return hashlib.sha1(content).hexdigest()
