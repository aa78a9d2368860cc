"""Files that programs write: whole or not at all, never over something else, and one line on a full disk."""

import argparse
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np

from reclm.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the file and its folder."""
    try:
        yield
    except OSError as error:
        reason, folder = error.strerror or error, Path(path).parent
        raise UserError(
            f"cannot write {path} ({reason}): free some space in {folder} or make it writable, then "
            "repeat the command, a training with --resume=auto"
        ) from None


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path next to `path` and rename the result: what was there stays until the
    new file is complete. Raises UserError if that fails."""
    path = Path(path)
    work = path.with_name(f".{path.stem}.writing{path.suffix}")  # writers look at the suffix
    try:
        with writing(path):
            write(work)
            os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save, whole or not at all: numpy itself does not notice that the last bytes were not written."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, lambda work: work.write_bytes(buffer.getbuffer()))


class ScriptParser(argparse.ArgumentParser):
    """The parser of a script, described by its docstring: a bad flag is one line."""

    def __init__(self, doc: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists all flags)")


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments --out and --overwrite of a script; `what` describes the file."""
    parser.add_argument("--out", type=Path, required=True, help=f"{what} to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def check_out(args: argparse.Namespace, suffixes: Iterable[str], inputs: Iterable[Path] = ()) -> None:
    """Raises UserError unless args.out ends in one of `suffixes`, lies in an existing folder, is none of
    `inputs` and, without --overwrite, does not exist. Call it before the work."""
    out, suffixes = args.out, list(suffixes)
    if out.suffix.lower() not in suffixes:
        raise UserError(f"--out={out} must end in {' or '.join(suffixes)}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    if out.exists() and not out.is_file():
        raise UserError(f"--out={out} is not a file: choose another name")
    for path in inputs:
        if path.exists() and out.exists() and out.samefile(path):
            raise UserError(f"--out={out} is an input of this command: choose another name")
    if out.exists() and not args.overwrite:
        raise UserError(f"--out={out} exists: choose another name or add --overwrite")
