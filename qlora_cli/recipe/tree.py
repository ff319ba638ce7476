"""Strict YAML: text to a tree of nodes, with every problem on the way.

Knows the parser's events; nothing of the schema. What YAML lets pass in silence is refused: duplicate keys, anchors
and aliases, tags, merge keys, keys that are not text, a second document, and secrets, because a run keeps the text. The
invariant: no input raises; what is wrong becomes a `Finding`, and a value that was refused becomes `Broken`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from qlora_cli.recipe.nodes import Broken, Entry, Finding, Items, Node, Place, Scalar, Table
from qlora_cli.recipe.scalars import Value, printable, read_plain
from qlora_cli.recipe.syntax import explain, unprintable
from qlora_cli.secrets import could_be_secret, held, names_secret, redact, same_start

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
_LOADER = getattr(yaml, "CLoader", yaml.Loader)


@dataclass(frozen=True)
class Parsed:
    """What a text holds; `root` is None when nothing of it could be used."""

    text: str
    root: Node | None
    findings: tuple[Finding, ...]


class _TooDeepError(Exception):
    """Nesting past `MAX_DEPTH`; already reported."""


def read_file(path: Path, source: str) -> Parsed:
    """The root table of a file; `source` names the file in messages."""
    start = Place(source, 1, 1)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return _refused(Finding(start, f"the file cannot be read (got {error!a})"))
    if len(raw) > MAX_BYTES:
        fix = "check that this is a recipe and not data"
        return _refused(Finding(start, "a recipe has at most 1 MiB (got more)", "no recipe is this large", fix))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return _refused(_not_utf8(error, raw, source))
    return parse_document(text, source)


def parse_document(text: str, source: str) -> Parsed:
    """The root table of a recipe's text."""
    builder = _Builder(text.removeprefix("\ufeff"), source)
    root = builder.build()
    findings = [*builder.findings, *builder.overlooked()]
    if not findings and (root is None or (isinstance(root, Scalar) and root.value is None)):
        fix = "write at least model.base, data.train and train.steps"
        findings.append(Finding(Place(source, 1, 1), "the recipe is empty", "nothing says what to train", fix))
        root = None
    elif isinstance(root, (Scalar, Items)):
        what = f"a recipe is a mapping of keys (got {kind(root)})"
        findings.append(Finding(root.place, what, "every setting has a name", "write `key: value` lines"))
        root = None
    if isinstance(root, Table):
        root = Table(Place(source, 1, 1), root.entries)
    return Parsed(text, root if isinstance(root, Table) else None, tuple(findings))


def parse_value(text: str, source: str, path: tuple[str, ...]) -> Parsed:
    """The value of an override of the key `path`: a scalar, a flow list or a flow mapping."""
    builder = _Builder(text, source, path)
    root = builder.build()
    return Parsed(text, root or Scalar(Place(source), None), tuple(builder.findings))


def kind(node: Node) -> str:
    """What a node is, in words."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    value = node.value if isinstance(node, Scalar) else None
    return "null" if value is None else "text" if isinstance(value, str) else "a single value"


def _refused(finding: Finding) -> Parsed:
    return Parsed("", None, (finding,))


def _not_utf8(error: UnicodeDecodeError, raw: bytes, source: str) -> Finding:
    before = raw[: error.start].decode("utf-8")
    place = Place(source, before.count("\n") + 1, len(before) - before.rfind("\n"))
    what = f"the file is not UTF-8 text (got byte 0x{raw[error.start]:02x})"
    return Finding(place, what, "a recipe is read as UTF-8 only", "save the file as UTF-8")


class _Builder:
    """One pass over the parser's events. `path` is the key an override sets; a file starts at ()."""

    def __init__(self, text: str, source: str, path: tuple[str, ...] = ()) -> None:
        self.findings: list[Finding] = []
        self._text = text
        self._source = source
        self._path = path
        self._depth = 0
        self._has_told = False
        self._events: Iterator[yaml.Event] = iter(())

    def build(self) -> Node | None:
        """The root of the first document; None when there is none or the text is not YAML."""
        if refused := unprintable(self._text, self._at):
            self.findings.append(refused)
            return None
        try:
            self._events = yaml.parse(self._text, Loader=_LOADER)
            return self._documents()
        except _TooDeepError:
            return None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: the pure parser on an escape past U+10FFFF
            self.findings.append(explain(error, self._text, self._at))
            return None

    def _documents(self) -> Node | None:
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                what = "a recipe is one document (got a second `---`)"
                self._report(event, (), what, "which of them counts would be a guess", "keep one document per file")
                return root
            if isinstance(event, yaml.NodeEvent):
                self._refuse_block(event)
                root = self._node(event, self._path)
        return root

    def _refuse_block(self, event: yaml.NodeEvent) -> None:
        """An override such as `a: b` would be a mapping, where text was surely meant."""
        if self._path and isinstance(event, yaml.CollectionStartEvent) and not event.flow_style:
            what = f"an override is a single value, [a list] or {{a: mapping}} (got {self._text!a})"
            self._report(event, self._path, what, "a colon and a space make a mapping of it", _QUOTE)

    def _node(self, event: yaml.NodeEvent, path: tuple[str, ...]) -> Node:
        """The node that `event` begins, its events consumed."""
        if isinstance(event, yaml.AliasEvent):
            what = f"aliases are refused (got *{printable(str(event.anchor))})"
            self._report(event, path, what, "a value must be readable where it stands", _QUOTE_OR_REPEAT)
            return Broken(self._place(event))
        if event.anchor is not None:
            what = f"anchors are refused (got &{printable(event.anchor)})"
            self._report(event, path, what, "a value must be readable where it stands", _QUOTE_OR_REPEAT)
        node = self._content(event, path)
        tag = getattr(event, "tag", None)
        if tag is None:
            return node
        what = f"tags are refused (got {printable(tag)})"
        self._report(event, path, what, "the schema says each value's type", 'remove the tag, or quote the text: "..."')
        return Broken(node.place)

    def _content(self, event: yaml.NodeEvent, path: tuple[str, ...]) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            what = f"nested deeper than {MAX_DEPTH} levels"
            self._report(event, path[:3], what, "no key of a recipe is that deep", "remove brackets or indentation")
            raise _TooDeepError
        node = self._mapping(event, path) if isinstance(event, yaml.MappingStartEvent) else self._list(event, path)
        self._depth -= 1
        return node

    def _scalar(self, event: yaml.ScalarEvent, path: tuple[str, ...]) -> Node:
        is_plain = event.style in (None, "")
        place = self._place(event)
        if any("\ud800" <= char <= "\udfff" for char in event.value):  # only the pure parser lets these pass
            self._report(event, path, f"half of a character pair (got {event.value!a})", "it is not Unicode text")
            return Broken(place)
        value = read_plain(event.value) if is_plain else event.value
        return Broken(place) if self._refused_secret(event, path, value) else Scalar(place, value, is_plain)

    def _refused_secret(self, event: yaml.ScalarEvent, path: tuple[str, ...], value: Value) -> bool:
        """Whether it is or holds a secret. The value is shown nowhere: what became of a part of one is not known."""
        what = held(event.value)
        if not what and path and names_secret(path[-1]) and isinstance(value, str) and could_be_secret(value):
            what = "what the key's name calls a secret"
        if what:
            self._report(event, path, f"a recipe may not hold {what}", _KEPT, _ENVIRONMENT)
            self._has_told = True
        return bool(what)

    def overlooked(self) -> list[Finding]:
        """The first secret that stands in no value: in a comment, or in what is not YAML."""
        what = "" if self._has_told else held(self._text)
        if not what:
            return []
        before = self._text[: same_start(self._text, redact(self._text))]
        place = self._at(before.count("\n"), len(before) - before.rfind("\n") - 1)
        return [Finding(place, f"a recipe may not hold {what}", _KEPT, _ENVIRONMENT)]

    def _list(self, event: yaml.NodeEvent, path: tuple[str, ...]) -> Node:
        nodes = []
        while isinstance(item := next(self._events), yaml.NodeEvent):
            nodes.append(self._node(item, path))
        place = self._place(event)
        return Broken(place) if any(isinstance(node, Broken) for node in nodes) else Items(place, tuple(nodes))

    def _mapping(self, event: yaml.NodeEvent, path: tuple[str, ...]) -> Table:
        entries: dict[str, Entry] = {}
        while isinstance(item := next(self._events), yaml.NodeEvent):
            name = self._key(item, path)
            inner = path if name is None else (*path, name)
            first = entries.get(name) if name is not None else None
            if first:
                what = f"this key is set twice (first at {first.key})"
                self._report(item, inner, what, "which of the two counts would be a guess", "keep one of them")
            value = next(self._events)
            assert isinstance(value, yaml.NodeEvent), "a key is always followed by a node"
            node = self._node(value, inner)
            if name is not None and not first:
                entries[name] = Entry(self._place(item), node)
        return Table(self._place(event), entries)

    def _key(self, event: yaml.NodeEvent, path: tuple[str, ...]) -> str | None:
        """The key's text; None when it was refused."""
        node = self._node(event, path)
        if isinstance(node, Broken):
            return None
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            got = repr(event.value) if isinstance(event, yaml.ScalarEvent) else kind(node)
            self._report(event, path, f"a key must be text (got {got})", "every key of a recipe is a word")
            return None
        if node.value == "<<" and node.plain:
            fix = "write `extends: NAME` at the top, or repeat the keys"
            self._report(
                event, path, "merge keys are refused (got <<)", "a value must be readable where it stands", fix
            )
            return None
        return node.value

    def _report(self, event: yaml.Event, path: tuple[str, ...], what: str, why: str = "", fix: str = "") -> None:
        key = f"{printable('.'.join(path))}: " if path else ""
        self.findings.append(Finding(self._place(event), key + what, why, fix))

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return self._at(mark.line, mark.column) if mark else self._at(0, 0)

    def _at(self, line: int, column: int) -> Place:
        return Place(self._source) if self._path else Place(self._source, line + 1, column + 1)


_KEPT = "a run keeps its recipe as it stands, and hands it on with every adapter"
_ENVIRONMENT = "remove it; a secret belongs in the environment (HF_TOKEN), a login in `hf auth login`"
_QUOTE = 'put the value in quotes: "..."'
_QUOTE_OR_REPEAT = 'repeat the value, or put it in quotes if it is text: "..."'
