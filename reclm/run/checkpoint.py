"""Checkpoints: epoch_N.pth, last.pth, best.pth. Written whole or not at all, read with nothing but data.

    version, config (flat)
    model                       the weights to evaluate
    trained, optimizer          the weights to train on, where --ema makes them differ; its state
    progress, history           main.Progress; one row per epoch
    dataset, protocol, fingerprint, ids   which data it fits
    vocabulary, items, titles, genre_names   what inference needs of the data (`about_data`)

No random state: all draws are functions of (seed, epoch, step, process), see `seed_step`.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch

from reclm.config import Config, fixed_names
from reclm.data.dataset import Dataset, Vocabulary
from reclm.errors import UserError, first_line
from reclm.run import dist
from reclm.run.logger import say

VERSION = 6  # raise it when the same file would mean another model, and teach `upgrade` the step
NO_LONGER = {  # settings of version 4 that are gone, and what they are now
    "scores": "dot", "random_windows": 0.0, "attention_norm": "length", "norm_eps": 1e-6, "time_weight": 0.1,
    "gbce_t": 0.75, "split_seed": 0, "unordered_ok": False,
}  # fmt: skip
RENAMED = {  # beginnings of names of weights
    "click_head.": "head.",
    "inputs.action_embedding.": "inputs.code_embeddings.actions.",
    "inputs.context_embedding.": "inputs.code_embeddings.contexts.",
}


def save_checkpoint(state: dict, out_dir: Path, names: list[str]) -> None:
    """Write `state` once and give it all of `names`. Raises UserError; what was there stays whole."""
    first, *others = [out_dir / name for name in names]
    work = first.with_name(f".{first.name}.writing")
    try:
        with open(work, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a renamed but empty file
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
            f"cannot save {first} ({error}): free some space and go on with "
            f"--resume=auto --out_dir={out_dir}; the previous checkpoint is whole"
        ) from None
    finally:
        work.unlink(missing_ok=True)


def prune(out_dir: Path, keep_last: int, spare: str) -> None:
    """Delete all but the newest `keep_last` epoch files (0 = none), and never `spare`."""
    if keep_last:
        for path in epoch_files(out_dir)[:-keep_last]:
            if path.name != Path(spare).name:
                path.unlink()


def epoch_files(out_dir: Path) -> list[Path]:
    """epoch_N.pth by N."""
    number = re.compile(r"epoch_(\d+)\.pth")
    found = [(number.fullmatch(path.name), path) for path in Path(out_dir).glob("epoch_*.pth")]
    return [path for match, path in sorted((int(m[1]), p) for m, p in found if m)]


def find_checkpoint(name: str, out_dir: Path) -> Path:
    """The file called `name` in out_dir, or at the path `name`. Raises UserError listing what there is."""
    for path in (Path(out_dir) / name, Path(name)):
        if path.is_file():
            return path
    there = [path.name for path in epoch_files(out_dir)]
    there += [name for name in ("best.pth", "last.pth") if (Path(out_dir) / name).is_file()]
    raise UserError(
        f"no checkpoint {name} in {out_dir}; there are: {', '.join(there) or 'none'}"
        + ("" if there else " (train first: --eval_only=false)")
    )


def about_data(dataset: Dataset) -> dict:
    """What a checkpoint holds of the data."""

    def plain(array: np.ndarray) -> torch.Tensor | list[str]:  # numbers, or text: no pickled objects
        return torch.from_numpy(np.array(array)) if array.dtype.kind in "iuf" else array.tolist()

    vocabulary = vars(dataset.vocabulary) | {
        "cold_items": plain(dataset.cold_items),
        "features": {name: plain(rows) for name, rows in dataset.features.items()},
    }
    names = ("items", "titles", "genre_names")
    return {
        "dataset": dataset.name,
        "protocol": dataset.protocol,
        "fingerprint": dataset.fingerprint,
        "ids": dataset.ids,
        "vocabulary": vocabulary,
        **{name: plain(getattr(dataset, name)) for name in names},
    }


def read_vocabulary(state: dict) -> Vocabulary:
    """The sizes a checkpoint's model was built with, from the file alone."""
    saved = state["vocabulary"]
    features = {name: rows.numpy() for name, rows in saved["features"].items()}
    return Vocabulary(**saved | {"cold_items": saved["cold_items"].numpy(), "features": features})


def load_checkpoint(path: Path) -> dict:
    """The state in a file, on the CPU. Raises UserError for a truncated or foreign file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write; refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(
            f"{path} is truncated or not a checkpoint ({first_line(error)}): "
            "use another --ckpt_name or --resume"
        ) from None
    wanted = {"model", "optimizer", "progress", "history", "config", "dataset", "fingerprint"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this program: use another one")
    if state.get("version") in (4, 5):
        upgrade(state, path)
    if state.get("version") != VERSION:
        raise UserError(
            f"{path} was written by another version of this program: train again, or use that one"
        )
    return state


def upgrade(state: dict, path: Path) -> None:
    """Bring a file of version 4 or 5 up to date, in place; one of version 4 lacks the data for inference
    (`about_data`). Raises UserError where it was trained with a setting that is gone."""
    config = state["config"]
    config.pop("pad_to", None)  # it never changed a weight
    if config.get("time_head"):
        raise UserError(f"{path} has an older --time_head, which is gone: use the version that wrote it")
    if config["task"] == "ctr":  # histories used to include earlier rows of the same second
        config["ctr_delay"] = 0.0
    if state["version"] == 4:
        upgrade_from_4(state, path)
    state["version"] = VERSION


def upgrade_from_4(state: dict, path: Path) -> None:
    config = state["config"]
    for name, now in NO_LONGER.items():
        if config.pop(name, now) != now:
            raise UserError(
                f"{path} was trained with another --{name} than {now}, which this version does not have: use "
                "the version that wrote it"
            )
    if config.pop("schedule", None) == "constant":
        config["lr_min"] = 1.0
    for weights in (state["model"], state.get("trained", {})):
        for old, new in RENAMED.items():
            for name in [name for name in weights if name.startswith(old)]:
                weights[name.replace(old, new)] = weights.pop(name)


def merge_config(given: dict, state: dict, path: Path, *parts: str) -> dict:
    """The checkpoint's settings overridden by what the user gave. A different value for a setting that one of
    these parts of the checkpoint fixes (see reclm/config.py) raises a UserError that names both."""
    saved = state["config"]
    for name in fixed_names(saved, *parts):
        if name in given and name in saved and given[name] != saved[name]:
            raise UserError(
                f"--{name}={given[name]} contradicts {path}, which has {name}={saved[name]}: "
                "leave the flag out, or choose another checkpoint"
            )
    return saved | given


def restore_model(model: torch.nn.Module, state: dict, path: Path, dataset: Dataset) -> None:
    """Load the weights. Raises UserError when they belong to other data or another architecture."""
    if state["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{path} was trained on {state['dataset']} with fingerprint {state['fingerprint']}, but the "
            f"data here is {dataset.name} with fingerprint {dataset.fingerprint}: "
            "use the same --dataset, --data_dir and --item_features"
        )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit this architecture: {reason}") from None


def start_from(model: torch.nn.Module, path: Path, dataset: Dataset, cfg: Config) -> None:
    """--init_from: copy the weights that have the same names and shapes here; the others keep their initial
    values. Raises UserError where users or items have other numbers, or where the checkpoint has learned from
    what this run is to be tested with."""
    if not path.is_file():
        raise UserError(f"--init_from={path}: no such file; name the .pth of a run")
    state = load_checkpoint(path)
    ours = cfg.flat()
    for name in fixed_names(ours, "leak"):
        if state["config"].get(name) != ours[name]:
            raise UserError(
                f"--init_from={path} was trained with {name}={state['config'].get(name)}, this run has "
                f"{name}={ours[name]}: it may have learned from what this run is tested with; train it with "
                "the same settings of data"
            )
    if state.get("ids") != dataset.ids:
        raise UserError(f"--init_from={path} was trained on other users or items: use the same data")
    weights = model.state_dict()
    if state["model"]["item_embedding.weight"].shape != weights["item_embedding.weight"].shape:
        raise UserError(f"--init_from={path} has another --dim than {ours['dim']}: use the same")
    shared = {
        name: value
        for name, value in state["model"].items()
        if name in weights and value.shape == weights[name].shape
    }
    model.load_state_dict(shared, strict=False)
    fresh = sorted({name.split(".")[0] for name in weights.keys() - shared.keys()})
    say(f"started from {path}: {len(shared)} of {len(weights)} weights; new: {', '.join(fresh) or 'none'}")


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Make dropout a function of (seed, epoch, step, share of the data): a resumed run needs no saved random
    state, and processes that share the data share the masks."""
    mixed = torch.tensor([seed, epoch, step, dist.data_rank()], dtype=torch.int64)
    factors = torch.tensor([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F])  # primes of xxHash
    torch.manual_seed(int((mixed * factors).sum()) & (2**63 - 1))
