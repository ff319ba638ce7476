"""Where an OpenAI-compatible endpoint is, and the key to it.

Knows the names of environment variables. Invariant: a key goes to no URL but the one it was set for, and is in no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from qlora_cli.errors import MachineError

PATH = "/chat/completions"
URLS, KEYS = ("QLORA_JUDGE_URL", "OPENAI_BASE_URL"), ("QLORA_JUDGE_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True)
class Address:
    """Where to ask, and with which key (none where it is empty)."""

    url: str
    key: str = field(default="", repr=False)

    @property
    def in_the_open(self) -> bool:
        """Whether the key passes a network unencrypted."""
        local = urlsplit(self.url).hostname in {"localhost", "127.0.0.1", "::1"}
        return bool(self.key) and self.url.lower().startswith("http:") and not local


def find_address(environment: Mapping[str, str]) -> Address:
    """The address that the environment names. A key of OpenAI's is sent to the URL of the same kind only. Raises
    `MachineError` where there is no URL, or what is there cannot be one."""
    name = next((each for each in URLS if environment.get(each, "").strip()), None)
    if name is None:
        raise MachineError(
            f"no endpoint is named: {' and '.join(URLS)} are not set",
            fix=f"set {URLS[0]} to the base URL, e.g. http://localhost:8000/v1, and {KEYS[0]} to its key if it has one",
        )
    url = environment[name].strip().rstrip("/").removesuffix(PATH)
    if not _is_base(url):
        fix = "write http(s)://HOST[:PORT]/v1, without user, query or fragment"
        raise MachineError(f"{name} is no base URL of an endpoint (got {url})", fix=fix)
    names = KEYS[:1] if name == URLS[0] else KEYS
    key_name = next((each for each in names if environment.get(each, "").strip()), None)
    key = environment[key_name].strip() if key_name else ""
    if not re.fullmatch(r"[!-~]*", key):
        what = f"{key_name} is no key: it holds a space, a line break or a letter beyond ASCII"
        raise MachineError(what, fix="copy the key once more")
    return Address(url, key)


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is none
    except ValueError:
        return False
    named = re.fullmatch(r"[!-~]+", url) and parts.scheme in {"http", "https"} and parts.hostname
    return bool(named) and not (parts.username or parts.password or parts.query or parts.fragment)
