"""Checkpoints: epoch_N.pth, last.pth, best.pth. Written atomically, and loaded as tensors and plain values
only (weights_only=True), so that a file cannot run code.

    version, config             config: the flat settings
    model                       the weights to evaluate
    trained, optimizer          the weights to train on, where --ema or --adapter makes them differ; the
                                optimizer's state
    averaged, base              with --adapter: their average; what is adapted (init_from.Base)
    progress, history           Progress; the log rows of all epochs
    dataset, protocol, fingerprint, ids      the data that it fits
    num_rows, user_keys, user_rows, last_time   how to tell whether these have grown (reclm/data/grown.py)
    vocabulary, items, titles, genre_names, item_counts, values   what inference needs of the data
                                (`about_data`); who did what is in histories.npz (reclm/data/histories.py)

There is no random state: all draws depend on (seed, epoch, step, place in the batch) only, see `seed_step`.
"""

import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reclm.config import FIELDS, Config, fixed_names
from reclm.data.dataset import Dataset, Vocabulary
from reclm.data.grown import Trained, align, check_same_codes, why_other_data
from reclm.data.sources import FINDERS
from reclm.errors import UserError, first_line
from reclm.run.validate import check_state

VERSION = 6  # raise it when the same file would mean another model, and extend `upgrade`
NO_LONGER = {  # settings of version 4 that were removed, and the values that are now fixed
    "scores": "dot", "random_windows": 0.0, "attention_norm": "length", "norm_eps": 1e-6, "time_weight": 0.1,
    "gbce_t": 0.75, "split_seed": 0, "unordered_ok": False,
}  # fmt: skip
USERS = "user_embedding.weight"  # with --user_embedding=explicit
RENAMED = {  # prefixes of weight names in version 4
    "click_head.": "head.",
    "inputs.action_embedding.": "inputs.code_embeddings.actions.",
    "inputs.context_embedding.": "inputs.code_embeddings.contexts.",
}


@dataclass
class Progress:
    """How far a run has come. Saved in every checkpoint."""

    epoch: int = 0  # the next epoch to run
    step: int = 0  # the next optimizer step in it
    loss_sum: float = 0.0  # over all targets of this epoch so far
    num_targets: int = 0  # of this epoch so far
    seconds: float = 0.0  # of wall-clock time, over all launches of this run
    best_score: float = -math.inf  # best validation score so far (metrics.CHOOSE_BY)
    best_epoch: int = -1
    bad_epochs: int = 0  # epochs without improvement, for --patience


def save_checkpoint(state: dict, out_dir: Path, names: list[str]) -> None:
    """Write `state` to `out_dir` under each of `names`. Each file is replaced atomically, so a crash or a
    full disk leaves the previous one intact. Raises UserError if it cannot be written."""
    first, *others = [out_dir / name for name in names]
    work = first.with_name(f".{first.name}.writing")
    try:
        with open(work, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # without it a power cut could leave a renamed but empty file
        os.replace(work, first)
        for other in others:
            work = other.with_name(f".{other.name}.writing")
            work.unlink(missing_ok=True)
            try:
                os.link(first, work)  # a second name for the same bytes
            except OSError:  # a file system without hard links
                shutil.copyfile(first, work)
            os.replace(work, other)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot save {first} ({error}): free some disk space and continue with "
            f"--resume=auto --out_dir={out_dir}; the previous checkpoint is intact"
        ) from None
    finally:
        work.unlink(missing_ok=True)


def prune(out_dir: Path, keep_last: int, spare: str) -> None:
    """Delete epoch_N.pth files but the newest `keep_last` and `spare`; with keep_last = 0 delete none."""
    if keep_last:
        for path in epoch_files(out_dir)[:-keep_last]:
            if path.name != Path(spare).name:
                path.unlink()


def epoch_files(out_dir: Path) -> list[Path]:
    """The epoch_N.pth files of a folder, in the order of N."""
    number = re.compile(r"epoch_(\d+)\.pth")
    found = [(number.fullmatch(path.name), path) for path in Path(out_dir).glob("epoch_*.pth")]
    return [path for match, path in sorted((int(m[1]), p) for m, p in found if m)]


def find_checkpoint(name: str, out_dir: Path) -> Path:
    """The path of the file `name` in out_dir, else of the file at the path `name`. Raises UserError, listing
    the checkpoints in out_dir, if there is neither."""
    for path in (Path(out_dir) / name, Path(name)):
        if path.is_file():
            return path
    there = [path.name for path in epoch_files(out_dir)]
    there += [name for name in ("best.pth", "last.pth") if (Path(out_dir) / name).is_file()]
    raise UserError(
        f"no checkpoint {name} in {out_dir}; available: {', '.join(there) or 'none'}"
        + ("" if there else " (train first: --eval_only=false)")
    )


def about_data(dataset: Dataset) -> dict:
    """The entries of a checkpoint that describe the data: identity, vocabulary, ids and titles."""

    def plain(array: np.ndarray) -> torch.Tensor | list[str]:  # types that weights_only=True can load
        return torch.from_numpy(np.array(array)) if array.dtype.kind in "iuf" else array.tolist()

    vocabulary = vars(dataset.vocabulary) | {
        "cold_items": plain(dataset.cold_items),
        "features": {name: plain(rows) for name, rows in dataset.features.items()},
    }
    names = ("items", "titles", "genre_names", "user_keys")
    timed = {} if dataset.last_time is None else {"last_time": dataset.last_time}
    return timed | {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
        "fingerprint": dataset.fingerprint,
        "ids": dataset.ids,
        "num_rows": dataset.num_rows,
        "user_rows": plain(dataset.lengths.astype(np.int32)),
        "vocabulary": vocabulary,
        "values": dataset.values,
        "item_counts": plain(dataset.item_counts),
        **{name: plain(getattr(dataset, name)) for name in names},
    }


def read_vocabulary(state: dict) -> Vocabulary:
    """The Vocabulary that the model of a checkpoint was built with, from the file alone."""
    try:
        saved = state["vocabulary"]
        features = {name: rows.numpy() for name, rows in saved["features"].items()}
        return Vocabulary(**saved | {"cold_items": saved["cold_items"].numpy(), "features": features})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the vocabulary of the checkpoint is damaged ({first_line(error)})") from None


def load_checkpoint(path: Path) -> dict:
    """The state in a file, on the CPU, as `checked`. Raises UserError for a truncated or foreign file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write; refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(
            f"{path} is truncated or not a checkpoint ({first_line(error)}): "
            "choose another with --ckpt_name or --resume"
        ) from None
    return checked(state, path)


def checked(state: dict, path: Path) -> dict:
    """The state read from `path`, upgraded to VERSION. Raises UserError for one that is foreign or damaged
    and for an unsupported version."""
    wanted = {"model", "optimizer", "progress", "history", "config", "dataset", "fingerprint"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this program: choose another file")
    known = isinstance(state.get("version"), int)  # a tensor cannot be compared
    if known and state["version"] in (4, 5) and isinstance(state["config"], dict):
        upgrade(state, path)
    if not known or state["version"] != VERSION:
        raise UserError(
            f"{path} was written by another version of this program: use that version or train again"
        )
    check_state(state, path)
    state["config"].setdefault("optimizer", "adamw")  # earlier versions had no other
    if state["config"].get("dataset") not in FINDERS:
        state["config"].setdefault("repeats", "keep")  # earlier versions dropped no rows
    return state


def upgrade(state: dict, path: Path) -> None:
    """Convert a state of version 4 or 5 to VERSION, in place; one of version 4 still lacks the data that
    inference needs (`about_data`). Raises UserError if it was trained with a setting that was removed."""
    config = state["config"]
    config.pop("pad_to", None)  # it never changed a weight
    if config.get("time_head"):
        raise UserError(f"{path} has an older kind of --time_head: use the version that wrote it")
    if config.get("task") == "ctr":  # histories included earlier rows of the same second then
        config["ctr_delay"] = 0.0
    if state["version"] == 4:
        upgrade_from_4(state, path)
    for name in config.keys() - FIELDS.keys():  # settings of theirs that changed nothing
        del config[name]
    state["version"] = VERSION


def upgrade_from_4(state: dict, path: Path) -> None:
    config = state["config"]
    for name, now in NO_LONGER.items():
        if config.pop(name, now) != now:
            raise UserError(
                f"{path} was trained with a --{name} other than {now}, which this version does not support: "
                "use the version that wrote it"
            )
    if config.pop("schedule", None) == "constant":
        config["lr_min"] = 1.0
    for weights in (state["model"], state.get("trained", {})):
        for old, new in RENAMED.items():
            for name in [name for name in weights if name.startswith(old)]:
                weights[name.replace(old, new)] = weights.pop(name)


def merge_config(given: dict, state: dict, path: Path, *parts: str) -> dict:
    """{name: value}: the checkpoint's settings, overridden by those the user has `given`. Raises UserError if
    they differ in a setting that one of these `parts` fixes (PARTS in reclm/settings.py)."""
    saved = state["config"]
    for name in fixed_names(saved, *parts):
        if name not in given or name not in saved or may_have_moved(name, given[name], saved[name]):
            continue
        if given[name] != saved[name]:
            raise UserError(
                f"--{name}={given[name]} contradicts {path}, which has {name}={saved[name]}: "
                "leave the flag out or choose another checkpoint"
            )
    return saved | given


def may_have_moved(name: str, ours: str | None, theirs: str | None) -> bool:
    """Do both name files of the user, which may lie elsewhere by now? Their content decides then: see
    `restore_model`."""
    if name == "dataset":
        return ours not in FINDERS and theirs not in FINDERS
    if name == "item_features":
        files = [[Path(part.strip()).name for part in (text or "").split(",")] for text in (ours, theirs)]
        return files[0] == files[1]
    return False


def read_trained(state: dict) -> Trained | None:
    """What a checkpoint tells about the data of its training; None where it does not name the items."""
    if not {"items", "vocabulary", "protocol"} <= state.keys():
        return None
    return Trained(
        items=np.asarray(state["items"]),
        vocabulary=read_vocabulary(state),
        protocol=state["protocol"],
        num_rows=state.get("num_rows"),
        user_keys=state["user_keys"].numpy() if "user_keys" in state else None,
        user_rows=state["user_rows"].numpy() if "user_rows" in state else None,
        last_time=state.get("last_time"),
    )


def known_part(dataset: Dataset, state: dict | None, cfg: Config) -> Dataset:
    """The dataset, or where a file of the user has grown since training, what the model of a checkpoint knows
    of it. Raises UserError where test rows may have been training rows (reclm/data/grown.py)."""
    if state is None or dataset.fingerprint == state["fingerprint"].partition("-")[0]:
        return dataset
    then = read_trained(state)
    if cfg.data.dataset in FINDERS or then is None or why_other_data(dataset, then, USERS in state["model"]):
        return dataset  # refused by restore_model
    return align(dataset, then, cfg)


def restore_model(model: torch.nn.Module, state: dict, path: Path, dataset: Dataset) -> None:
    """Load the weights to evaluate. Raises UserError if they belong to other data or another architecture."""
    same = state["fingerprint"] == dataset.fingerprint
    # A model of the hub knows the fingerprint of the sequences alone (reclm/serve/hub.py).
    same_rows = state["fingerprint"] == dataset.fingerprint.partition("-")[0]
    if dataset.grown or (same_rows and not same):
        check_same_codes(dataset, read_vocabulary(state))
    elif not same:
        then = read_trained(state)
        why = then and why_other_data(dataset, then, USERS in state["model"])
        why = f" ({why})" if why else ""
        raise UserError(
            f"{path} was trained on {state['dataset']} with fingerprint {state['fingerprint']}, but the "
            f"data here is {dataset.name} with fingerprint {dataset.fingerprint}{why}: "
            "use the same --dataset, --data_dir and --item_features, or where the data have grown, a new run "
            f"with --init_from={path}"
        )
    load_weights(model, state, path)


def restore_training(model: torch.nn.Module, averaged: torch.nn.Module, state: dict, path: Path) -> None:
    """Load the weights to train on, and their average, where they are not those to evaluate."""
    for target, entry in ((averaged, "averaged"), (model, "trained")):
        if entry in state:
            load_weights(target, state | {"model": state[entry]}, path)


def load_weights(model: torch.nn.Module, state: dict, path: Path) -> None:
    """Load the weights to evaluate. Raises UserError if they belong to another architecture."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit this architecture, choose another: {reason}") from None


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed torch's generator from (seed, epoch, step), alike in all processes, so that draws depend on these
    and the place of a sequence in the batch only (reclm/draws.py): a resumed run needs no saved random
    state and goes on alike with any number of processes."""
    mixed = torch.tensor([seed, epoch, step], dtype=torch.int64)
    factors = torch.tensor([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D])  # primes of xxHash
    torch.manual_seed(int((mixed * factors).sum()) & (2**63 - 1))
