"""The generated documents are those that the code makes today."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(
    f"typer=={importlib.metadata.version('typer')}" not in (ROOT / "scripts/constraints.txt").read_text("utf-8"),
    reason="each version of Typer writes help in its own way",
)
def test_the_generated_documents_are_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "run: python scripts/make_docs.py"
