"""Writing that survives a crash: temporary name, fsync, rename; and hashes by which damage is noticed.

Knows files only. Invariant: under a final name there is either nothing, the old content, or the whole new content.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskError, QloraError, RunDirectoryError

MANIFEST = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about `path` into a `DiskError`."""
    try:
        yield
    except OSError as error:
        raise _disk_error(path, error) from error
    except QloraError:
        raise
    except Exception as error:
        if "(os error " not in str(error):  # how safetensors and tokenizers pass on what the system said
            raise
        raise _disk_error(path, error) from error


def _disk_error(path: Path, error: Exception) -> DiskError:
    free = _free_bytes(path)
    return DiskError(f"cannot write {path}: {error}", fix=f"free space there: {free}; choose another place with -o DIR")


def check_space(path: Path, needed: int, what: str = "the run") -> None:
    """Raises `DiskError` when fewer than `needed` bytes are free where `path` will be."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"{path}: {what} will write {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there",
            fix="free space, or choose another place with -o DIR",
        )


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder, and in those in it."""
    return sum(map(_file_size, folder.rglob("*")))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # removed meanwhile
        return 0


def _free_bytes(path: Path) -> str:
    for folder in (path, *path.parents):
        if folder.is_dir():
            return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB"
    return "unknown"


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`, atomically."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            _apply_umask(Path(temporary))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _apply_umask(path: Path) -> None:
    """mkstemp and safetensors create files that only their owner may read; the user's umask decides instead."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


@contextmanager
def staged_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final`, renamed to it when the block ends well and removed when it does not. With
    `replace`, a folder that already has that name is exchanged with it and then deleted."""
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))
    try:
        yield staging
        give_name(staging, final, replace)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def give_name(staging: Path, final: Path, replace: bool = False) -> None:
    """Renames a folder that is whole to `final`, beside it, once all of it is on the disk. `RunDirectoryError` where
    there is something of that name, unless with `replace`."""
    with disk_errors(final):
        _sync_tree(staging)
        if replace and final.is_dir() and any(final.iterdir()):
            _replace(staging, final)
        else:
            _take_name(staging, final)
        _sync_folder(final.parent)


def _take_name(staging: Path, final: Path) -> None:
    try:
        staging.replace(final)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        why = "something else was put there while this command ran"
        raise RunDirectoryError(f"{final} exists", why=why, fix="move it away and run again") from error


def _replace(staging: Path, final: Path) -> None:
    if not _exchange(staging, final):  # a moment without a folder of that name; the old one is then in .trash-*
        trash = Path(tempfile.mkdtemp(prefix=f".trash-{final.name}-", dir=final.parent))
        final.replace(trash)
        staging.replace(final)
        staging = trash
    shutil.rmtree(staging, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step (Linux's renameat2); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return rename is not None and rename(*arguments) == 0


def write_manifest(folder: Path) -> None:
    """Writes manifest.json: size and SHA-256 of every other file of `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(folder / MANIFEST, entries)


def manifest_problems(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """What of `names` (default: all) is not as manifest.json says; nothing where there is no manifest, or one in which
    no entry is of the kind that `write_manifest` makes: other programs have files of that name."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or not any(map(_is_entry, entries.values())):
            return []
        wanted = {name: entry for name, entry in entries.items() if names is None or name in names}
        return [problem for name, entry in wanted.items() if (problem := _damage(folder, name, entry))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]


def unlisted(folder: Path) -> list[str]:
    """Names of the files below `folder` that its manifest.json does not list."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        entries = {}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in found if name != MANIFEST and name not in entries]


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "sha256"}


def _damage(folder: Path, name: str, entry: dict[str, Any]) -> str:
    """What is wrong with a file of a manifest; empty when nothing is."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:  # links are fine: the Hub's cache consists of them
        return f"{name} lies outside of the folder"
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name} has {size:,} bytes instead of {entry['bytes']:,}"
    return "" if sha256(path) == entry["sha256"] else f"{path.name} is not as it was written (its SHA-256 differs)"


def _sync_tree(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _apply_umask(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    folder.chmod(0o777 & ~umask)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_folder(path: Path) -> bool:
    """Whether it is a folder; a name that cannot be one is none."""
    try:
        return path.is_dir()
    except OSError:  # a name too long for a file, say
        return False


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sample_hash(path: Path) -> str:
    """SHA-256 of the file's size and of up to 16 pieces of 64 KiB, evenly spaced over it."""
    size = path.stat().st_size
    piece = 1 << 16
    starts = range(0, size, piece) if size <= 16 * piece else [i * (size - piece) // 15 for i in range(16)]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()
