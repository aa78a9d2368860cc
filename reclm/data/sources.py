"""Locate a dataset by name: `Source` holds its files, its protocol and the reader for them.

`find_dataset` downloads missing files (see download.py); `read_dataset` reads a `Source` into
tables (see readers.py). Both raise `UserError`, one line with the problem and its remedy.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from reclm.data.cache import META
from reclm.data.columns import Wishes
from reclm.data.download import (
    M1_MD5,
    M1_REPO,
    WHEEL,
    WHEEL_FILES,
    X1_ARCHIVE,
    X1_MD5,
    X1_REPO,
    fetch_grouplens,
    fetch_hub,
    fetch_wheel,
    verify,
)
from reclm.data.own import find_files, name_of_data, read_own, read_side_table, side_files
from reclm.data.readers import READERS, RawData
from reclm.errors import UserError

# Side tables first: files are moved in this order, so the last one marks a complete folder.
ML_1M_FILES = ("users.dat", "movies.dat", "ratings.dat")
ML_100K_FILES = ("u.user", "u.item", "u.data")


@dataclass(frozen=True)
class Source:
    """The files of a dataset and how to read them."""

    name: str  # one of FINDERS, or the stem of the user's file
    protocol: str  # a short phrase, printed with the results; "" = follows from the columns
    files: tuple[Path, ...]  # all that the reader reads, in a fixed order; hashed for the cache key
    reader: str  # key into READERS, "own" or "prepared"
    notes: tuple[str, ...] = ()  # caveats to print with the results
    side_files: tuple[tuple[str, Path], ...] = ()  # of own data: ("user" or "item", its table)

    @property
    def is_own(self) -> bool:
        return self.reader == "own"


def find_dataset(dataset: str | None, data_dir: str | Path) -> Source:
    """Locate `dataset`, a key of FINDERS or what own.find_files takes, in `data_dir` and download it if
    missing. None means MovieLens-1M, or MovieLens-100K if that is not available. Raises UserError if it is
    unknown, or neither present nor downloadable."""
    if dataset in FINDERS:
        return FINDERS[dataset](Path(data_dir))
    return _find_own(dataset)


def _find_any(data_dir: Path) -> Source:
    """MovieLens-1M, or MovieLens-100K with a note if that is not available."""
    try:
        return _find_ml_1m(data_dir)
    except UserError as error:
        no_1m = error
    try:
        if _local_ml_100k(data_dir) is None:
            fetch_wheel(data_dir)
    except UserError as no_100k:
        raise UserError(
            f"no dataset: {data_dir} has neither ml-1m/ratings.dat nor ml-100k/u.data; "
            f"ml-1m: {no_1m}; ml-100k: {no_100k}"
        ) from no_100k
    loud = (
        f"MovieLens-1M is not in {data_dir} and cannot be downloaded: training on MovieLens-100K "
        f"instead (943 users). Reason: {no_1m}"
    )
    source = _local_ml_100k(data_dir)
    return replace(source, notes=(loud, *source.notes))


def _find_ml_1m(data_dir: Path) -> Source:
    folder = data_dir / "ml-1m"
    if not (folder / "ratings.dat").is_file():
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
    """MovieLens-100K in `data_dir`: GroupLens' files, else those of the wheel, else None."""
    protocol = "ML-100K: u.data, stable sort by time, leave-one-out"
    if (data_dir / "ml-100k" / "u.data").is_file():
        files = _existing(data_dir / "ml-100k", ML_100K_FILES)
        return Source("ml-100k", protocol, files, "grouplens-100k")
    folder = data_dir / "ml-100k-recbole"
    if (folder / "ml-100k.inter").is_file():
        note = f"MovieLens-100K is read from {folder}, the copy in PyPI's {WHEEL}, with the same rows"
        return Source("ml-100k", protocol, _existing(folder, WHEEL_FILES), "recbole-100k", (note,))
    return None


def _find_sasrec(data_dir: Path) -> Source:
    file = data_dir / "ml-1m" / "sasrec" / "ml-1m.txt"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: copy data/ml-1m.txt of github.com/pmixer/SASRec.pytorch there, or "
            "use --dataset=ml-1m --min_item_count=5, which gives the same sequences"
        )
    protocol = "P3: SASRec's ml-1m.txt (items with 5 or more ratings), its order, leave-one-out"
    return Source("ml-1m-sasrec", protocol, (file,), "sasrec-txt")


def _find_m1(data_dir: Path) -> Source:
    """The lists of reczoo/Movielens1M_m1, and ratings.dat, which provides their order."""
    folder, ratings = data_dir / "ml-1m" / "reczoo_m1", data_dir / "ml-1m" / "ratings.dat"
    if not ratings.is_file():
        raise UserError(
            f"the lists of ml-1m-m1 are not chronological and need {ratings} (--dataset=ml-1m downloads it)"
        )
    protocol = "M1: 20-core of ratings.dat as in reczoo_m1, stable sort by time, leave-one-out"
    return Source("ml-1m-m1", protocol, (*_hub_files(M1_REPO, M1_MD5, folder), ratings), "reczoo-m1")


def _find_x1(data_dir: Path) -> Source:
    """reczoo/MovielensLatest_x1, for CTR: label 1 if the user gave this tag to this item."""
    files = _hub_files(X1_REPO, X1_MD5, data_dir / "movielens-latest-x1", X1_ARCHIVE)
    protocol = "MovielensLatest_x1: reczoo's own random split 7:2:1, no timestamps"
    note = (
        "movielens-latest-x1 has no timestamps: file order is taken as time order, and its random split lets "
        "a model learn from the future"
    )
    return Source("movielens-latest-x1", protocol, files, "reczoo-x1", (note,))


def _hub_files(repo: str, md5: dict[str, str], folder: Path, archive: str | None = None) -> tuple[Path, ...]:
    """Paths of the files {name: md5} in `folder`, verified; all are downloaded if one is missing."""
    if len(_existing(folder, md5)) < len(md5):
        fetch_hub(repo, md5, folder, archive)
    for name in md5:
        verify(folder / name, md5[name], "md5", folder / name)
    return _existing(folder, md5)


def _find_own(dataset: str) -> Source:
    folder = Path(dataset)
    if (folder / META).is_file() or (folder / "item_ids.npy").is_file():  # of scripts/prepare.py
        return Source(folder.resolve().name, "", (folder / META,), "prepared")
    files = find_files(dataset)
    if not files:
        raise UserError(
            f"unknown dataset {dataset!r}: neither one of {', '.join(filter(None, FINDERS))} nor an existing "
            "file (CSV, JSON lines, Parquet), folder of Parquet files or pattern like 'data/*.csv'"
        )
    sides = tuple(side_files(files[0]).items())
    return Source(name_of_data(dataset, files), "", files, "own", side_files=sides)


def _existing(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


FINDERS = {  # --dataset -> function of data_dir that returns its Source
    None: _find_any,
    "ml-1m": _find_ml_1m,
    "ml-1m-sasrec": _find_sasrec,
    "ml-1m-m1": _find_m1,
    "ml-100k": _find_ml_100k,
    "movielens-latest-x1": _find_x1,
}


SIZES = {  # of the original data: rows, users, items
    "ml-1m": (1_000_209, 6_040, 3_706),
    "ml-1m-sasrec": (999_611, 6_040, 3_416),
    "ml-100k": (100_000, 943, 1_682),
}


def check_size(source: Source, data: RawData) -> tuple[str, list[str]]:
    """(protocol, notes): the protocol of a named dataset holds only for all of its rows, users and items."""
    table = data.interactions
    if source.is_own:
        if "timestamp" in table:
            return source.protocol or "own file, stable sort by time, leave-one-out", []
        note = f"{source.files[0]} has no column timestamp: file order is taken as time order"
        return source.protocol or "own file, file order taken as time order, leave-one-out", [note]
    found = (len(table), table["user"].nunique(), table["item"].nunique())
    wanted = SIZES.get(source.name, found)
    if found == wanted:
        return source.protocol, []
    names = ("rows", "users", "items")
    differs = ", ".join(
        f"{have:,} {name} instead of {want:,}"
        for name, have, want in zip(names, found, wanted, strict=True)
        if have != want
    )
    note = f"{source.files[-1]} is not all of {source.name}: {differs}; do not compare with published results"
    _, _, rules = source.protocol.partition(": ")
    return f"not {source.name}, but {found[0]:,} rows: {rules}", [note]


def read_dataset(source: Source, wishes: Wishes | None = None) -> RawData:
    """Read the files of `source`; `wishes` are for own data. Raises UserError with the file and line of the
    first bad row."""
    if source.is_own:
        interactions, notes = read_own(source.files, wishes or Wishes())
        sides = {f"{column}s": read_side_table(file, column) for column, file in source.side_files}
        data = RawData(interactions, notes=notes, **sides)
    else:
        data = READERS[source.reader](source.files)
    if data.interactions.empty:
        raise UserError(f"{source.files[0]} is empty: it holds no interactions")
    return data
