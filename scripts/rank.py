"""Rank your own candidate items for each user by the probability that a CTR model predicts.

    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv
    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv --ckpt_name=runs/ctr/best.pth

candidates.csv has the columns user and item, and optionally timestamp, the time at which the item is shown
[default: the latest time in the data]. The output has the same rows with a column probability, that of a
positive action; each user's best candidates come first, and columns that main.py does not know are dropped.
The flags of `main.py --eval_only=true` apply.

The checkpoint must be of --task=ctr, and its data must contain every user and item. The model sees each
user's complete history, whatever the timestamp of a candidate.
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
from reclm.data.columns import IDS, Wishes
from reclm.data.dataset import Dataset
from reclm.data.impressions import SPLITS
from reclm.data.own import read_own
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.run import checkpoint, folder
from reclm.run.output import ScriptParser, add_out, check_out, write_whole


def rank(args: argparse.Namespace, given: dict) -> None:
    """Write the table args.candidates with probabilities to args.out; `given` are settings as of main.py.
    Raises UserError if the table or the checkpoint cannot be used."""
    candidates, out = args.candidates, args.out
    check_out(args, [".csv"], [candidates, Path(given.get("dataset") or "")])
    path = checkpoint.find_checkpoint(given.get("ckpt_name", "best.pth"), folder.chosen_dir(given))
    if not candidates.is_file():
        raise UserError(f"--candidates={candidates} does not exist: name a .csv file")
    table, _ = read_own((candidates,), Wishes())
    table = table.astype(dict.fromkeys(IDS, str))
    cfg, dataset, model = open_checkpoint(given, path)
    if table.empty:
        raise UserError(f"{candidates} has no rows: nothing to score")
    if not len(dataset.labels):
        raise UserError(f"{path} is of --task={cfg.model.task}: use a checkpoint of --task=ctr")
    asked, order = ask(dataset, table)
    logits, _, _ = score_impressions(model, asked, "asked")
    table = table.iloc[order].assign(probability=logits.double().sigmoid().numpy())
    by_user = table["user"].map({user: i for i, user in enumerate(dict.fromkeys(table["user"]))})
    table = table.assign(place=by_user).sort_values(["place", "probability"], ascending=[True, False])
    table = table.drop(columns="place")
    if "timestamp" in table and (table["timestamp"] % 1 == 0).all():
        table["timestamp"] = table["timestamp"].astype(np.int64)
    table["probability"] = table["probability"].map("{:.6g}".format)
    write_whole(out, lambda path: table.to_csv(path, index=False))
    print(f"{len(table):,} candidates of {by_user.nunique():,} users, written to {out}")


def ask(dataset: Dataset, candidates: pd.DataFrame) -> tuple[Dataset, np.ndarray]:
    """Add a table of candidates (user, item[, timestamp], original ids) to a CTR dataset as impressions of
    the split "asked". Returns the new dataset and the order of the table's rows in it, (rows,).

    The history of each is all rows of its user, from every split. Without timestamps, candidates are shown at
    the latest time in the data. Raises UserError if a user or item is not in the data."""
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
    """Original ids -> (rows,) their indices in the sorted ids `known`. Raises UserError if one is missing."""
    numbers = pd.to_numeric(ids, errors="coerce") if known.dtype.kind == "i" else ids
    places = pd.Index(known).get_indexer(numbers)
    missing = np.flatnonzero(places < 0)
    if len(missing):
        raise UserError(
            f"candidate {missing[0] + 1}: {what} {ids.iloc[missing[0]]} is not in the data "
            f"(as in {len(missing):,} candidates): remove such rows"
        )
    return places


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--candidates", type=Path, required=True, help="file with the candidates (CSV, JSON lines, Parquet)"
    )
    add_out(parser, ".csv file")
    args, others = parser.parse_known_args()
    rank(args, parse_args(others))


if __name__ == "__main__":
    run_script(main)
