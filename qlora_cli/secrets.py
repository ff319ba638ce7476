"""Secrets in text: how to tell them, and the text without them.

Knows the shapes of tokens and the environment variables whose names say that they hold one; nothing else of ours.
Invariant: `redact` changes a text exactly where `held` is not empty, and redacting twice changes nothing more.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

MARK = "[secret]"
LEAST, TELLING, SURELY = 8, 12, 16
"""Characters of a secret; those that tell a token where a message cut it; and from where on even letters or digits
alone are a secret, and not a word or a date."""

# A special token of a tokenizer is none; what says where one lies (HF_TOKEN_PATH) ends otherwise.
_NAMES = re.compile(
    r"(?:(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!stop_)token|(?:api|access|secret|private"
    r"|auth|judge)[_-]?key|secret|passw(?:or)?d|passphrase|credentials?|_pass|_pwd)\Z",
    re.IGNORECASE,
)
_START, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_QUERY = (
    r"token|api[_-]?key|(?:access|auth|refresh|id|sas)[_-]?token|password|secret|client_secret|sig|signature"
    r"|x-(?:amz|goog)-(?:signature|credential|security-token)"
)
# Kind: (what a text with one has, in lower case, which costs less to look for; the pattern). Group 1 stays before the
# secret, which never begins with the mark's bracket: a mark is no secret.
_SHAPES = {
    "a Hugging Face token": (("hf_", "api_org_"), rf"({_START})(?:hf|api_org)_[A-Za-z0-9]{{20,}}"),
    "an API key": (
        ("sk-", "k_live_", "k_test_", "aiza", "akia", "asia"),
        rf"({_START})(?:sk-(?:(?:proj|ant|or|svcacct|admin)-[\w-]{{20,}}|[A-Za-z0-9]{{20,}})"
        rf"|[sr]k_(?:live|test)_[A-Za-z0-9]{{16,}}|AIza[\w-]{{35,}}|(?:AKIA|ASIA)[A-Z0-9]{{16}}{_END})",
    ),
    "an access token": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "eyj"),
        rf"({_START})(?:gh[pousr]_[A-Za-z0-9]{{20,}}|github_pat_\w{{20,}}|glpat-[\w-]{{20,}}"
        r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)",
    ),
    "a private key": (
        ("private key-----",),
        r"()-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]{0,20000}-----END [A-Z ]{0,30}KEY-----|[\w+/=\\\r\n]*)",
    ),
    "an authorization header": (
        ("authorization",),
        r"(?i:(\bauthorization[\"']?\s{0,3}[:=]\s{0,3}b?[\"']?(?:bearer|basic|token)\s{1,3})[^\s\"'`,;<>\[\]]{6,})",
    ),
    "a bearer token": (
        ("bearer",),
        r"(\b[Bb]earer\s{1,3})(?:(?=[A-Za-z.~_+/=-]*\d)[\w.~+/=-]{8,}|[\w.~+/=-]{24,})",
    ),
    "a password in a URL": (
        (":/",),  # with one slash where it was taken for a path
        r"(?<=[A-Za-z0-9]{2})(:/{1,2}[^\s/:@\"'<>\[\]]*:)(?!\[secret\]@)[^\s/@\"'<>]+(?:@[^\s/@\"'<>]+)*(?=@)",
    ),
    "a token in a URL": ((":/",), r"(https?:/{1,2})[^\s/:@\"'<>\[\]]{16,}(?=@)"),
    "a token in a query": (("?", "&", ";"), rf"([?&;](?i:{_QUERY})=)[^\s&#\"'<>\[\]]{{4,}}"),
}
_compiled = functools.cache(re.compile)  # when first wanted: most commands meet few of them


def redact(text: str) -> str:
    """The text with `[secret]` for every secret that can be told: a known shape, or the value of an environment
    variable that says to hold one (also where a message cut it short)."""
    for spelling in _environment():
        text = _without(text, spelling)
    for pattern in _possible(text).values():
        text = pattern.sub(rf"\1{MARK}", text)
    return text


def redacted(value: Any) -> Any:
    """A JSON value, all its text redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(each) for key, each in value.items()}
    return [redacted(each) for each in value] if isinstance(value, list | tuple) else value


def held(text: str) -> str:
    """Which secret the text holds, in words; empty where it holds none."""
    for spelling, name in _environment().items():
        if _without(text, spelling) != text:
            return f"the value of the environment variable {name}"
    return next((kind for kind, pattern in _possible(text).items() if pattern.search(text)), "")


def _possible(text: str) -> dict[str, re.Pattern[str]]:
    lower = text.lower()
    return {kind: _compiled(shape) for kind, (hints, shape) in _SHAPES.items() if any(hint in lower for hint in hints)}


@functools.lru_cache(maxsize=1024)
def names_secret(name: str) -> bool:
    """Whether what goes by this name is a secret: `HF_TOKEN`, `api_key`, `DB_PASSWORD`; not `eos_token`."""
    return _NAMES.search(name) is not None


def could_be_secret(value: str) -> bool:
    """Whether a value is long and odd enough to be told from ordinary words, numbers and dates."""
    is_word = value.isdigit() or (value.isalpha() and value.islower())
    return len(value) >= (SURELY if is_word else LEAST) and MARK not in value


def _environment() -> dict[str, str]:
    """Every spelling of a secret in the environment with its variable, the longest first."""
    named = {name: os.environ.get(name, "").strip() for name in os.environ if names_secret(name)}
    found = {each: name for name, value in named.items() if could_be_secret(value) for each in _spellings(value)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0]))) if found else found


@functools.lru_cache(maxsize=64)
def _spellings(value: str) -> tuple[str, ...]:
    """As it is, within a URL, in Python's and in JSON's quotes."""
    from urllib.parse import quote  # not for those who have no secret

    return tuple(dict.fromkeys((value, quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1])))


def _without(text: str, value: str) -> str:
    """The text without the value, or without what is left of it where it was cut short."""
    head, parts, end = value[: _telling(value)], [], 0
    while (start := text.find(head, end)) >= 0:
        parts += [text[end:start], MARK]
        end = start + same_start(value, text[start : start + len(value)])
    return "".join([*parts, text[end:]]) if parts else text


def _telling(value: str) -> int:
    """How many first characters of a secret tell it: of a token few; of words more, with which other text may begin,
    too; of a path or URL all."""
    if "/" in value:
        return len(value)
    return TELLING if re.fullmatch(r"\w+", value) else max(SURELY, len(value) // 2)


def same_start(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))
