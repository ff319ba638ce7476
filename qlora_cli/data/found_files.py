"""The files that a path, a folder or a pattern names.

Knows names, not contents. Invariant: a name that finds nothing is an error that says what is near; the order of files
is that of their paths, whatever the file system's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from qlora_cli.data.readers import READERS, format_of
from qlora_cli.data.rows import shown
from qlora_cli.errors import DataError

_MAGIC = frozenset("*?[")
_BOOKKEEPING = {"dataset_info.json", "state.json"}  # what `datasets` writes beside the .arrow files that it saves
_SPLITS = "dataset_dict.json"  # and above the folders of splits
_NEAR = 5


def has_magic(path: str) -> bool:
    """Whether it is a pattern."""
    return not _MAGIC.isdisjoint(path)


def find_files(path: str) -> tuple[Path, ...]:
    """The files that `path` names, in order; whether they can be read is not looked at. Raises `DataError`."""
    try:
        place = Path(path).expanduser()
        if place.is_dir():
            return _of_folder(place)
        if has_magic(path) and not place.exists():
            return _matches(place)
        place.stat()
        return (place,)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", fix=_near(place)) from error
    except OSError as error:
        what = f"{shown(Path(error.filename or path))}: cannot be read: {error.strerror}"
        raise DataError(what, fix="check its name and permissions") from error
    except (ValueError, RuntimeError) as error:  # a NUL or `a**` in it; `~` of a user who has no home
        raise DataError(f"{path!r} names no file: {error}", fix="check the name") from error


def _of_folder(folder: Path) -> tuple[Path, ...]:
    if (folder / _SPLITS).is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise DataError(f"{shown(folder)} holds several splits", fix=f"name one of its folders: {', '.join(splits)}")
    found = sorted(_walk(folder, frozenset()))
    if not found:
        raise DataError(f"{shown(folder)} holds no file that rows are read from", fix=f"known are {', '.join(READERS)}")
    return tuple(found)


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The data files below `folder`. A link to a folder is followed, unless it leads back to one that it is in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    saved = any(format_of(entry) == ".arrow" for entry in entries)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry, above | {real})
        elif format_of(entry) is not None and not (saved and entry.name in _BOOKKEEPING):
            yield entry


def _matches(pattern: Path) -> tuple[Path, ...]:
    """Files that match; hidden ones only where the pattern names them, links to folders not followed by `**`."""
    base, rest = _base(pattern)
    if rest[-1] == "**":
        rest = (*rest, "*")
    hidden = any(part.startswith(".") for part in rest)
    matches = base.glob("/".join(rest)) if base.is_dir() else iter(())
    found = {path for path in matches if path.is_file() and (hidden or not _hidden(path.relative_to(base)))}
    if not found:
        raise DataError(f"{shown(pattern)}: no file matches", fix=_near(base / "*"))
    return tuple(sorted(found))


def _base(pattern: Path) -> tuple[Path, tuple[str, ...]]:
    """(the folder above the first part that is a pattern, the parts below it)."""
    first = next(index for index, part in enumerate(pattern.parts) if has_magic(part))
    return Path(*pattern.parts[:first]), pattern.parts[first:]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _near(missing: Path) -> str:
    """What there is in the nearest folder that exists: names like the missing one, else data files, else folders."""
    folder = missing.parent
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        names = [shown(Path(entry.name)) for entry in entries if entry.is_dir() or format_of(entry) is not None]
    except OSError:
        names = []
    near = get_close_matches(missing.name, names, n=_NEAR, cutoff=0.6) or names[:_NEAR]
    return f"{shown(folder)} has: {', '.join(near)}" if near else "paths are relative to the current folder"
