"""User and item features as arrays, and the selection that a run uses.

A code is a positive integer for a value or a word; 0 is "unknown", or padding after the last word."""

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from reclm.config import Config
from reclm.data.dataset import Dataset
from reclm.errors import UserError, first_line

AGE_BANDS = (18, 25, 35, 45, 50, 56)  # lower bounds of MovieLens-1M's age groups
WORDS = ("genres", "year", "title")  # parts of the item table that --item_features can name
FEEDBACK = "actions"  # name of the feedback codes, which a candidate does not have yet
MAX_LEVELS = 100  # largest number of distinct ratings with a code each


def choose_inputs(dataset: Dataset, cfg: Config) -> Dataset:
    """The dataset with the optional inputs of this run attached (profiles, item features, feedback codes)
    and negative feedback marked. The fingerprint is extended by a hash of these inputs. Raises UserError if
    the data lack an input that `cfg` requests; later code relies on this check."""
    chosen, codes, meanings, values, read = {}, {}, {}, {}, []
    notes = [*dataset.notes, *check_times(dataset, cfg)]
    if cfg.model.profile_tokens:
        if not dataset.profiles.shape[1]:
            raise UserError(f"--profile_tokens needs a user table, but {dataset.name} has none: leave it out")
        meanings |= {name: code for name, code in dataset.meanings.items() if name != "contexts"}
        values |= {name: texts for name, texts in dataset.values.items() if name != "contexts"}
        chosen["profile_sizes"] = tuple(int(size) for size in dataset.profiles.max(0) + 1)
        read.append(dataset.profiles)
        notes += note_unknown(dataset.profiles, "users", "row in the user table")
    if cfg.model.item_features:
        chosen["features"] = dataset.features or load_features(cfg.model.item_features, dataset)
        for name, rows in chosen["features"].items():
            read.append(rows)
            notes += note_unknown(rows, "items", f"known {name}")
    if cfg.model.action_embedding:
        codes[FEEDBACK] = feedback_codes(dataset)
        meanings[FEEDBACK] = meaning(dataset.ratings) if len(dataset.ratings) else "label"
        values[FEEDBACK] = as_texts(np.unique(dataset.ratings)) if len(dataset.ratings) else ["0", "1"]
        read.append(codes[FEEDBACK])
    if len(dataset.contexts):
        codes["contexts"] = dataset.contexts
        meanings |= {name: code for name, code in dataset.meanings.items() if name == "contexts"}
        values |= {name: texts for name, texts in dataset.values.items() if name == "contexts"}
    if cfg.loss.negative_below is not None:
        chosen["negative"] = ratings_for("negative_below", dataset) < cfg.loss.negative_below
        share = chosen["negative"].mean()
        notes.append(f"{share:.1%} of the actions are negative feedback: never targets of the loss")
    fingerprint = dataset.fingerprint
    if read:
        fingerprint += "-" + hashlib.sha256(b"".join(array.tobytes() for array in read)).hexdigest()[:8]
    chosen |= {"codes": codes, "meanings": meanings, "values": values}
    return replace(dataset, notes=notes, fingerprint=fingerprint, **chosen)


def check_times(dataset: Dataset, cfg: Config) -> list[str]:
    """Notes about timestamps. Raises UserError if a setting needs them and the data have none."""
    if len(dataset.timestamps):
        known = "the model knows the time of the item to predict (--request_time=true)"
        return [known] if cfg.model.request_time else []
    for name in ("request_time", "time_tokens", "time_head"):
        if getattr(cfg.model, name) not in (False, "none"):
            raise UserError(f"--{name} needs timestamps, but {dataset.name} has none: leave it out")
    off = "the data have no timestamps: the time bias of hstu is off"
    return [off] if cfg.model.model_name == "hstu" else []


def note_unknown(rows: np.ndarray, whose: str, what: str) -> list[str]:
    """A note with the number of rows that are all 0 (unknown); empty if there are none."""
    count = int((rows == 0).all(1).sum())
    return [f"{count:,} of {len(rows):,} {whose} have no {what}"] if count else []


def feedback_codes(dataset: Dataset) -> np.ndarray:
    """(rows,) int64: `rating_levels`, or without ratings 1 + label. Raises UserError without either."""
    if len(dataset.labels) and not len(dataset.ratings):
        return 1 + dataset.labels
    return rating_levels(ratings_for("action_embedding", dataset))


def ratings_for(flag: str, dataset: Dataset) -> np.ndarray:
    """(rows,) float64 ratings. Raises UserError, naming the flag that needs them, if there are none."""
    if not len(dataset.ratings):
        raise UserError(f"--{flag} needs ratings, but {dataset.name} has none: leave it out")
    return dataset.ratings


def meaning(values: np.ndarray | pd.Series) -> str:
    """A hash of the distinct values, 8 hex digits: codes mean the same where they number the same values."""
    return hashlib.sha256("\n".join(map(str, np.unique(values))).encode()).hexdigest()[:8]


def as_texts(values: np.ndarray | pd.Series) -> list[str]:
    """The distinct values behind the codes 1, 2, ... as a person would type them: 5, not 5.0."""
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def profile_codes(table: pd.DataFrame | None, users: np.ndarray) -> tuple[np.ndarray, dict, dict]:
    """((U, P) int64: one code per user and column of the user table, P = 0 without a table; {column:
    `meaning`}; {column: texts of the values behind the codes 1, 2, ...}). Ages are grouped by AGE_BANDS and
    shown as the lower end of the group, zip codes by their first character (the region). Users without a row
    are 0 throughout."""
    if table is None:
        return np.zeros((len(users), 0), dtype=np.int64), {}, {}
    rows = table.drop_duplicates("user").set_index("user").reindex(users)
    if "age" in rows:
        ages = pd.to_numeric(rows["age"], errors="coerce")
        rows["age"] = pd.Series(np.digitize(ages, AGE_BANDS), rows.index).where(ages.notna())
    if "zip" in rows:
        rows["zip"] = rows["zip"].str[:1]
    codes, meanings, texts = [], {}, {}
    for name in rows:
        numbers, values = pd.factorize(rows[name].replace("", None), sort=True)
        codes.append(numbers + 1)
        meanings[f"column {name} of the user table"] = meaning(values)
        texts[name] = as_texts([(0, *AGE_BANDS)[int(band)] for band in values] if name == "age" else values)
    return np.stack(codes, axis=1).astype(np.int64), meanings, texts


def word_codes(table: pd.DataFrame | None, items: np.ndarray) -> dict[str, np.ndarray]:
    """{"genres" | "year" | "title": (V - 1, K) int64}: word codes, padded with 0; K = 0 without the column.
    A year is two words, itself and its decade; a title word counts only if two or more titles have it."""
    empty = np.zeros((len(items), 0), dtype=np.int64)
    found = dict.fromkeys(WORDS, empty)
    if table is None:
        return found
    rows = table.drop_duplicates("item").set_index("item").reindex(items)
    if "genres" in rows:
        found["genres"] = number_words([text.split("|") for text in rows["genres"].fillna("")])
    if "title" in rows:
        titles = rows["title"].fillna("")
        years = titles.str.extract(r"\((\d{4})\)\s*$")[0].fillna("")
        found["year"] = number_words([[year, f"{year[:3]}0s"] if year else [] for year in years])
        words = [set(re.findall(r"\w+", re.sub(r"\(\d{4}\)\s*$", "", text.lower()))) for text in titles]
        count = Counter(word for title in words for word in title)
        found["title"] = number_words([sorted(w for w in title if count[w] > 1) for title in words])
    return found


def item_texts(table: pd.DataFrame | None, items: np.ndarray) -> dict[str, np.ndarray]:
    """{"titles": (V - 1,), "genre_names": (V - 1,)} from the item table, without missing columns."""
    found = {}
    for name, column in (("titles", "title"), ("genre_names", "genres")):
        if table is not None and column in table:
            rows = table.drop_duplicates("item").set_index("item")[column].reindex(items).fillna("")
            found[name] = rows.to_numpy(str)
    return found


def number_words(lists: list[list[str]]) -> np.ndarray:
    """Lists of words -> (len(lists), K) int64 codes, numbered from 1 in sorted order and padded with 0."""
    words = sorted({word for words in lists for word in words if word})
    code = {word: i + 1 for i, word in enumerate(words)}
    codes = np.zeros((len(lists), max(map(len, lists))), dtype=np.int64)
    for row, words in zip(codes, lists, strict=True):
        row[: len(words)] = [code.get(word, 0) for word in words]
    return codes


def rating_levels(ratings: np.ndarray) -> np.ndarray:
    """(rows,) int64 from 1, the lowest rating. Raises UserError for more than MAX_LEVELS distinct ratings."""
    values, levels = np.unique(ratings, return_inverse=True)
    if len(values) > MAX_LEVELS:
        raise UserError(
            f"--action_embedding=true, but the column rating has {len(values):,} different values, more than "
            f"{MAX_LEVELS}: round the ratings"
        )
    return levels + 1


def load_features(spec: str, dataset: Dataset) -> dict[str, np.ndarray]:
    """--item_features -> {name: codes (V - 1, K) int64 or vectors (V - 1, F) float32}, one row per item in
    the order of dataset.items. Raises UserError if a part is unknown, named twice or not in the data."""
    found = {}
    for part in map(str.strip, spec.split(",")):
        if part in WORDS:
            if not dataset.words[part].any():
                raise UserError(
                    f"--item_features={part}, but {dataset.name} has no {part} for its items: leave it out"
                )
            new = {part: dataset.words[part]}
        else:
            new = {name: check_vectors(part, v, dataset) for name, v in read_matrices(Path(part)).items()}
        if twice := found.keys() & new.keys():
            raise UserError(f"--item_features={spec} has {min(twice)} twice: rename one")
        found |= new
    return found


def read_matrices(path: Path) -> dict[str, np.ndarray]:
    """{name: array}: a .npy file under the stem of its name, or all tensors of a .safetensors file. Raises
    UserError if the file cannot be read."""
    if path.suffix not in (".npy", ".safetensors") or not path.is_file():
        raise UserError(
            f"--item_features has {str(path)!r}, which is neither one of {', '.join(WORDS)} nor an existing "
            ".npy or .safetensors file"
        )
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an .npz archive")
            return {path.stem: array}
        from safetensors.numpy import load_file

        found = load_file(path)
        if not found:
            raise ValueError("it has no tensors")
        return found
    except ImportError:
        raise UserError(f"reading {path} needs safetensors: pip install safetensors") from None
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"{path} is truncated or not a numeric array ({first_line(error)}): write it again"
        ) from None


def check_vectors(path: str, vectors: np.ndarray, dataset: Dataset) -> np.ndarray:
    """(V - 1, F) float32: rows centred on their mean, then scaled to unit length. A row of zeros marks an
    item without features: it is left out of the mean and stays zero. Raises UserError unless `vectors`
    is a finite numeric matrix with one row per item."""
    if vectors.ndim != 2 or not vectors.shape[1] or vectors.dtype.kind not in "iuf":
        raise UserError(
            f"{path} has shape {vectors.shape} of {vectors.dtype}, expected a numeric matrix with "
            "one row per item"
        )
    if len(vectors) != dataset.num_items:
        raise UserError(
            f"{path} has {len(vectors):,} rows, but {dataset.name} has {dataset.num_items:,} items: it "
            "needs one row per item, sorted by id; make it with the same --dataset and --min_item_count"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UserError(
            f"{path} is not finite in {len(bad):,} rows, first in row {bad[0]} (item "
            f"{dataset.items[bad[0]]}): use zeros for an item without features"
        )
    vectors = vectors.astype(np.float32)
    known = vectors.any(1, keepdims=True)
    vectors = (vectors - vectors.mean(0, where=known)) * known if known.any() else vectors
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
