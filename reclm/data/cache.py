"""Prepared arrays on disk: one folder per dataset and settings, written whole and checked before use."""

import json
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reclm.errors import UserError

META = "meta.json"  # in a folder of prepared data
PART = 2**22  # rows of a long array that are worked on at once


def cache_root() -> tuple[Path, list[str]]:
    """($RECLM_CACHE, else ~/.cache/reclm, []). Where that cannot be written, a folder for temporary files of
    this user, and a note."""
    chosen = os.environ.get("RECLM_CACHE")
    try:
        root = Path(chosen) if chosen else Path.home() / ".cache" / "reclm"
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root, []
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        user = os.getuid() if hasattr(os, "getuid") else "user"
        other = Path(tempfile.gettempdir()) / f"reclm-cache-{user}"
        other.mkdir(parents=True, exist_ok=True)
        where = chosen or "~/.cache/reclm"
        return other, [f"{where} is not writable ({error}): prepared data go to {other}; set RECLM_CACHE"]


def release(*arrays: np.ndarray) -> None:
    """Take what was read of memory maps out of the memory of this process. It stays in the system's cache of
    files, so reading it again is fast; without this, a process ends up with all of a map in its memory."""
    for array in arrays:
        if isinstance(getattr(array, "_mmap", None), mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array._mmap.madvise(mmap.MADV_DONTNEED)


def parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array in slices of at most PART rows, each released when the next one is asked for."""
    for first in range(0, len(array), PART):
        yield array[first : first + PART]
        release(array)


def checksum(array: np.ndarray) -> int:
    found = 0
    for part in parts(array) if array.size else ():
        found = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8), found)
    return found


def describe(array: np.ndarray) -> list:
    """What `read_cache` compares: type, shape and a checksum of the content."""
    return [array.dtype.str, list(array.shape), checksum(array)]


def write_cache(folder: Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Build the folder elsewhere and rename it, so that a killed run leaves no incomplete entry. Files behind
    memory maps are moved, not copied. Raises UserError on a full disk."""
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".preparing-"))
    try:
        for name, array in arrays.items():
            target = work / f"{name}.npy"
            os.replace(array.filename, target) if isinstance(array, np.memmap) else np.save(target, array)
        content = [meta, {name: describe(array) for name, array in arrays.items()}]
        text = json.dumps(content)
        (work / META).write_text(json.dumps([*content, zlib.crc32(text.encode())]))
        if read_cache(work) is None:  # numpy does not notice that the last bytes of a file were not written
            raise OSError("not all of it was written")
        try:
            work.rename(folder)
        except OSError:  # another run finished first, with the same content
            if read_cache(folder) is None:
                raise
    except OSError as error:
        size = sum(array.nbytes for array in arrays.values()) / 2**20
        raise UserError(
            f"cannot write the prepared data, {size:,.1f} MB, into {folder.parent} "
            f"({error.strerror or error}): free some space there or choose another folder (RECLM_CACHE, or "
            "--out of scripts/prepare.py)"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_cache(folder: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """(meta, memory-mapped arrays) of `write_cache`; None if the folder is missing or its content changed."""
    try:
        meta, described, checked = json.loads((folder / META).read_text())
        if zlib.crc32(json.dumps([meta, described]).encode()) != checked:
            return None
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in described}
    except (OSError, ValueError, TypeError, EOFError):
        return None
    return (meta, arrays) if {name: describe(a) for name, a in arrays.items()} == described else None
