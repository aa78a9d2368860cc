"""Score your own candidates with a model of --task=ctr: how likely is it that each user likes each item?

    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv
    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv --ckpt_name=runs/ctr/best.pth

candidates.csv has the columns user and item, and may have a timestamp: when they are shown (else at the last
moment of the data). The whole history of a user is known. Written are the same rows with the probability of a
positive action, the best of each user first. All flags of `main.py --eval_only=true` count.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import score_impressions
from main import open_checkpoint
from reclm.data.dataset import Dataset
from reclm.data.impressions import SPLITS
from reclm.data.readers import READERS
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.run import checkpoint, folder


def rank(candidates: Path, out: Path, given: dict) -> None:
    path = checkpoint.find_checkpoint(given.get("ckpt_name", "best.pth"), folder.chosen_dir(given))
    if not candidates.is_file():
        raise UserError(f"--candidates={candidates}: no such file")
    table = READERS["csv"]((candidates,)).interactions
    cfg, dataset, model = open_checkpoint(given, path)
    if not len(dataset.labels):
        raise UserError(f"{path} is of --task={cfg.model.task}: train one with --task=ctr")
    asked, order = ask(dataset, table)
    logits, _, _ = score_impressions(model, asked, "asked")
    table = table.iloc[order].assign(probability=logits.double().sigmoid().numpy())
    by_user = table["user"].map({user: i for i, user in enumerate(dict.fromkeys(table["user"]))})
    table = table.assign(place=by_user).sort_values(["place", "probability"], ascending=[True, False])
    table.drop(columns="place").to_csv(out, index=False, float_format="%.6g")
    print(f"{len(table):,} candidates of {by_user.nunique():,} users, written to {out}")


def ask(dataset: Dataset, candidates: pd.DataFrame) -> tuple[Dataset, np.ndarray]:
    """A dataset of --task=ctr and a table of candidates, user, item [, timestamp] by original ids -> the
    dataset with them as impressions of the split "asked", and the order of the table's rows in it.

    The history of each is all that its user did, of whatever split. Without timestamps they are shown at the
    last moment of the data. Raises UserError."""
    users, items = (find(candidates[name], getattr(dataset, f"{name}s"), name) for name in ("user", "item"))
    order = np.argsort(users, kind="stable")
    users, items = users[order], items[order]
    by_time = np.arange(len(dataset.item_ids))
    if len(dataset.timestamps):
        by_time = np.lexsort((dataset.timestamps, dataset.owner))
        last = dataset.timestamps.max()
        shown = candidates["timestamp"].to_numpy()[order] if "timestamp" in candidates else last
    behind = dataset.offsets[users + 1]

    def add(array: np.ndarray, value: np.ndarray | int) -> np.ndarray:
        return np.insert(array[by_time], behind, value)

    counts = np.bincount(users, minlength=dataset.num_users)
    return replace(
        dataset,
        offsets=dataset.offsets + np.concatenate([[0], np.cumsum(counts)]),
        item_ids=add(dataset.item_ids, items + 1),
        splits=add(dataset.splits, SPLITS["asked"]),
        labels=add(dataset.labels, 0),
        history_lengths=add(dataset.history_lengths, dataset.lengths[users]),
        timestamps=add(dataset.timestamps, shown) if len(dataset.timestamps) else dataset.timestamps,
        ratings=add(dataset.ratings, 0) if len(dataset.ratings) else dataset.ratings,
        codes={name: add(codes, 0) for name, codes in dataset.codes.items()},
    ), order


def find(ids: pd.Series, known: np.ndarray, what: str) -> np.ndarray:
    """Original ids -> their places in the sorted ids `known`. Raises UserError."""
    numbers = pd.to_numeric(ids, errors="coerce") if known.dtype.kind == "i" else ids
    places = pd.Index(known).get_indexer(numbers)
    missing = np.flatnonzero(places < 0)
    if len(missing):
        raise UserError(
            f"candidate {missing[0] + 1} names the {what} {ids.iloc[missing[0]]}, which is not in the data "
            f"({len(missing):,} candidates are not): drop it"
        )
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--candidates", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args, others = parser.parse_known_args()
    try:
        rank(args.candidates, args.out, parse_args(others))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
