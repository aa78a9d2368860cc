"""--init_from: a new run that starts from the weights of a checkpoint, also one that was trained when the
user's file had fewer rows, users or items, or with --init_match on other data."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reclm.config import FIELDS, Config, fixed_names
from reclm.data.dataset import Dataset
from reclm.data.grown import NAMES, Trained, check_splits, may_have_trained, other_codes, places
from reclm.data.sources import FINDERS
from reclm.errors import UserError
from reclm.run import dist
from reclm.run.checkpoint import USERS, load_checkpoint, read_trained
from reclm.run.logger import say

ITEMS = "item_embedding.weight"


@dataclass(frozen=True)
class Base:
    """What a run took from a checkpoint, and by what to know it again. An adapter (reclm/adapt/lora.py) fits
    this base alone."""

    name: str  # of the file, with its folder
    weights: str  # hash_weights of it
    fresh: list[str]  # tensors of the model that it lacks
    new_items: Tensor  # (n,) int64, the numbers of items whose vectors it lacks


def hash_weights(weights: dict[str, Tensor]) -> str:
    """Hash of names, shapes and values, 16 hex digits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {list(weights[name].shape)}".encode())
        found.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def start_from(model: torch.nn.Module, path: Path, dataset: Dataset, cfg: Config) -> Base:
    """Copy the weights whose name and shape agree with the model's; the others keep their initial values.
    Vectors of items are copied as --init_match says and those of users by id, tables of codes and words only
    where these mean the same. Raises UserError if no item is shared or --dim differs, and if the checkpoint
    may have been trained on this run's test data."""
    state, match = dist.from_main(lambda: read_base(path, cfg)), cfg.train.init_match
    weights, saved, said = model.state_dict(), dict(state["model"]), ""
    if cfg.model.item_table == "pq":
        weights[ITEMS] = model.item_embedding.dense().detach()
    if saved[ITEMS].shape[1:] != weights[ITEMS].shape[1:]:
        raise UserError(
            f"--init_from={path} was trained with another --dim than {cfg.model.dim}: use the same"
        )
    then, same_ids = read_trained(state), match == "id" and state.get("ids") == dataset.ids
    if not same_ids and (then is None or (match == "id" and cfg.data.dataset in FINDERS)):
        raise UserError(
            f"--init_from={path} was trained on other users or items: train it on the same data, or find "
            "items by --init_match=title"
        )
    place = np.arange(dataset.num_items)
    if then is not None:
        place = find_items(path, state, dataset, match)
        if match == "id" and (not same_ids or then.num_rows not in (None, dataset.num_rows)):
            check_splits(dataset, then, cfg)
            note_doubtful(path, then, dataset)
        if not same_ids:
            said = move_vectors(path, saved, weights, place, then, dataset, match)
        said += drop_other_meanings(saved, then, dataset, same_ids, place)
    shared = {
        name: value for name, value in saved.items() if name in weights and value.shape == weights[name].shape
    }
    if cfg.model.item_table == "pq":
        said += as_codes(shared, model, cfg.train.seed)
    model.load_state_dict(shared, strict=False)
    missing = sorted(weights.keys() - shared.keys())
    new = ", ".join(dict.fromkeys(name.split(".")[0] for name in missing)) or "none"
    say(f"started from {path}: {len(shared)} of {len(weights)} tensors; new: {new}{said}")
    new_items = torch.from_numpy(np.flatnonzero(place < 0) + 1)
    print_of_it = hash_weights(state["model"]) if cfg.adapt.adapter != "none" else ""
    return Base("/".join(path.resolve().parts[-2:]), print_of_it, missing, new_items)


def read_base(path: Path, cfg: Config) -> dict:
    """The checkpoint to start from. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"--init_from={path}: no such file; give the path of a .pth file")
    state = load_checkpoint(path)
    if cfg.train.init_match == "id":  # else users are others, and so are test rows
        check_leak(path, state, cfg)
    if state["config"].get("item_table", "dense") != "dense":
        raise UserError(f"--init_from={path} has no vector per item (item_table=pq): choose another")
    return state


def as_codes(shared: dict[str, Tensor], model: torch.nn.Module, seed: int) -> str:
    """Replace vectors of items by codes and sub-vectors of --item_table=pq, in place. Returns what to say."""
    table = shared.pop(ITEMS)
    taken = dist.on_main(lambda: model.item_embedding.take(table, seed))
    shared |= {f"item_embedding.{name}": value for name, value in taken.items()}
    return f"; item vectors are now {model.item_embedding.num_codes} codes each"


def find_items(path: Path, state: dict, dataset: Dataset, match: str) -> np.ndarray:
    """(V - 1,) int64: where each item of the data stands among those of the checkpoint; -1 where it does not.
    Raises UserError where one of them has no titles to find it by."""
    if match == "none":
        return np.full(dataset.num_items, -1)
    if match == "id":
        return places(dataset.items, np.asarray(state["items"]))
    for what, titles in ((path, state.get("titles", [])), (dataset.name, dataset.titles)):
        if not len(titles):
            raise UserError(f"--init_match=title: {what} has no titles: give its items a table with titles")
    known = {}
    for number, title in enumerate(state["titles"]):
        known.setdefault(plain_title(title), number)
    known.pop("", None)
    return np.array([known.get(plain_title(title), -1) for title in dataset.titles], np.int64)


def plain_title(title: str) -> str:
    """ "Star Wars: Episode IV (1977)" -> "star wars episode iv 1977": the same under any punctuation."""
    return " ".join(re.findall(r"\w+", title.casefold()))


def check_leak(path: Path, state: dict, cfg: Config) -> None:
    """Raises UserError where a setting differs that decides which rows are test rows."""
    ours = cfg.flat()
    for name in fixed_names(ours, "leak"):
        theirs = state["config"].get(name, FIELDS[name].default)
        if theirs != ours[name]:
            raise UserError(
                f"--init_from={path} was trained with {name}={theirs}, this run has "
                f"{name}={ours[name]}: it may have seen this run's test data; use the same data settings "
                "for both"
            )


def note_doubtful(path: Path, then: Trained, dataset: Dataset) -> None:
    """Print, and note with the data, how many users' held-out rows may have been training rows."""
    doubtful = may_have_trained(dataset, then, dataset.lengths).sum()
    if doubtful:
        note = f"of {doubtful:,} users, rows that are held out here may have been training rows of {path}"
        dataset.notes.append(note)
        say(f"NOTE: {note}")


def move_vectors(
    path: Path,
    saved: dict[str, Tensor],
    weights: dict[str, Tensor],
    place: np.ndarray,
    then: Trained,
    dataset: Dataset,
    match: str,
) -> str:
    """Number the vectors of items and users in `saved` as `dataset` does, in place; new ones get those of
    `weights`. `place` is that of `find_items`. Returns what to say. Raises UserError without a shared item,
    and where users are unknown."""
    if match != "id":
        saved.pop(USERS, None)  # of other people
    if match == "none":
        del saved[ITEMS]
        return f"; all {dataset.num_items:,} items start untrained"
    tables = {ITEMS: place}
    gone = len(then.items) - len(np.unique(place[place >= 0]))
    if gone == len(then.items):
        raise UserError(f"--init_from={path} was trained on other items: none is in {dataset.name}")
    if USERS in saved and USERS in weights:
        if then.user_keys is None:
            raise UserError(
                f"--init_from={path} does not tell whose vectors those of --user_embedding=explicit are: "
                "train it on the same data"
            )
        tables[USERS] = places(dataset.user_keys, then.user_keys)
    said = ""
    if match == "title":
        said = f"; {(place >= 0).sum():,} of {len(place):,} items are shared by title and year"
    for name, place in tables.items():
        first = int(name == ITEMS)  # item 0 is padding
        there, moved = torch.from_numpy(place >= 0), weights[name].clone()
        moved[first:][there] = saved[name][first:][torch.from_numpy(place)[there]].to(moved.device)
        saved[name] = moved
        said += f"; {(place < 0).sum():,} new {name.partition('_')[0]}s start untrained"
    return said + f"; {gone:,} items of the checkpoint are not in the data" * bool(gone)


def drop_other_meanings(
    saved: dict[str, Tensor], then: Trained, dataset: Dataset, same_ids: bool, place: np.ndarray
) -> str:
    """Drop from `saved`, in place, the tables whose codes or words are numbered otherwise in `dataset`, and
    number those of item_features as there. Returns what to say."""
    ours, theirs = dataset.vocabulary, then.vocabulary
    tables = {name: f"inputs.code_embeddings.{name}.weight" for name in NAMES}
    others = other_codes(ours, theirs) if theirs.meanings or same_ids else sorted(ours.meanings)
    others = {name: tables.get(name, "inputs.token_embedding.weight") for name in others}
    dropped = [NAMES.get(name, name) for name, table in others.items() if table in saved]
    for table in others.values():
        saved.pop(table, None)
    there, content = place >= 0, {name: saved.pop(name) for name in [*saved] if name.startswith("content.")}
    for i, (name, rows) in enumerate(ours.features.items()):
        if name not in theirs.features:
            continue
        if rows.dtype.kind == "i" and not same_words(rows[there], theirs.features[name][place[there]]):
            dropped.append(f"words of {name}")
            continue
        j = list(theirs.features).index(name)
        for part in ("projections", "gates"):
            if f"content.{part}.{j}.weight" in content:
                saved[f"content.{part}.{i}.weight"] = content[f"content.{part}.{j}.weight"]
    return f"; numbered anew, so untrained: {', '.join(dropped)}" if dropped else ""


def same_words(one: np.ndarray, other: np.ndarray) -> bool:
    """Are the codes (n, K) equal to the others, (n, L), but for padding?"""
    width = max(one.shape[1], other.shape[1])
    one, other = (np.pad(codes, ((0, 0), (0, width - codes.shape[1]))) for codes in (one, other))
    return bool((one == other).all())
