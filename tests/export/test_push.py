"""Uploads, against a server on this machine that speaks the part of the Hub's protocol that an upload needs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "1" * 40
TOKEN = "hf_planted_token_of_the_test"


class Hub(ThreadingHTTPServer):
    """What was asked of it, and what it refuses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.paths: list[str] = []
        self.refuse = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Login, creation, upload in one commit of plain files."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path.endswith("/whoami-v2") and TOKEN in (self.headers["authorization"] or ""):
            self._send(200, {"type": "user", "name": "someone", "auth": {}})
        elif self.path.endswith("/whoami-v2"):
            self._send(401, {"error": "Invalid credentials"})
        else:
            self._send(200, {"id": "someone/merged", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        if self.server.refuse and self.server.refuse in self.path:
            self._send(403, {"error": "You may not write here"})
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._send(
                200, {"url": f"{self.server.address}/someone/merged", "id": "someone/merged", "name": "someone/merged"}
            )
        elif self.path.endswith("/validate-yaml"):
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": wanted})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._send(
                200,
                {
                    "commitUrl": f"{self.server.address}/someone/merged/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                },
            )
        else:
            self._send(404, {"error": self.path})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "merged"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "README.md").write_text("# card\n")
    return made


def push(hub: Hub, folder: Path, public: bool = False, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qlora_cli.errors import QloraError\n"
        "from qlora_cli.export.push import check_push, push\n"
        "try:\n"
        "    check_push('someone/merged')\n"
        f"    print(push(Path({str(folder)!r}), 'someone/merged', {public}))\n"
        "except QloraError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "HTTPS_PROXY", "HTTP_PROXY"}}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HOME": str(folder.parent / "hf"),
        "NO_PROXY": "*",
    }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def is_private(created: dict[str, Any]) -> bool:
    """In the words of either generation of the Hub's client."""
    return created["visibility"] == "private" if "visibility" in created else bool(created["private"])


def test_a_folder_and_its_card_are_uploaded_to_a_private_repository(hub: Hub, folder: Path) -> None:
    done = push(hub, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.created[0]["name"] == "merged" and is_private(hub.created[0])
    assert hub.files == {"config.json": b"{}", "README.md": b"# card\n"}
    assert "someone/merged" in done.stdout


def test_public_is_public(hub: Hub, folder: Path) -> None:
    assert push(hub, folder, public=True).returncode == 0
    assert not is_private(hub.created[0])


def test_a_wrong_login_is_an_error_before_anything_is_made_and_shows_no_token(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, token="hf_another_token")
    assert done.returncode == 6
    assert "does not know who you are" in done.stdout and "hf auth login" in done.stdout
    assert "hf_another_token" not in done.stdout + done.stderr
    assert hub.created == []


def test_a_refused_upload_says_that_the_folder_is_whole(hub: Hub, folder: Path) -> None:
    hub.refuse = "/commit/"
    done = push(hub, folder)
    assert done.returncode == 6
    assert f"the upload failed; {folder} is whole" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
