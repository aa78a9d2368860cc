"""Evaluate a checkpoint on two groups of users: those with a row that meets a condition, and all others.

    python scripts/evaluate_groups.py --rows="rating <= 2" --ckpt_name=runs/latest/best.pth
    python scripts/evaluate_groups.py --rows="user >= 3000 and rating <= 3 and timestamp < 975715200"

The condition is a pandas query on the columns user, item, rating and timestamp of the user's whole sequence.
The second example finds the users of MovieLens-1M of whom a copy with partly reconstructed timestamps has
such rows (docs/results.md). For --task=matching; the flags of `main.py --eval_only=true` apply.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import HELD_OUT
from evaluate import rank_users
from main import open_checkpoint
from reclm.data.dataset import Dataset
from reclm.errors import UserError, first_line, run_script
from reclm.flags import parse_args
from reclm.metrics import ranking_sums
from reclm.run import checkpoint, folder
from reclm.run.output import ScriptParser


def users_with(rows: str, dataset: Dataset) -> np.ndarray:
    """(U,) bool: does the user have a row that meets the condition? Raises UserError."""
    columns = {"user": dataset.users[dataset.owner], "item": dataset.items[dataset.item_ids - 1]}
    for name in ("ratings", "timestamps"):
        if len(getattr(dataset, name)):
            columns[name.removesuffix("s")] = getattr(dataset, name)
    try:
        found = pd.DataFrame(columns).query(rows).index
    except Exception as error:  # pandas raises nearly anything
        raise UserError(f"--rows={rows}: {first_line(error)}; columns: {', '.join(columns)}") from None
    return np.isin(np.arange(dataset.num_users), dataset.owner[found])


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--rows", required=True, help="condition on rows, a pandas query")
    args, flags = parser.parse_known_args()
    given = parse_args(flags)
    path = checkpoint.find_checkpoint(given.get("ckpt_name", "best.pth"), folder.chosen_dir(given))
    cfg, dataset, model = open_checkpoint(given, path)
    if cfg.model.task != "matching":
        raise UserError(f"{path} is of --task={cfg.model.task}: use one of --task=matching")
    chosen = torch.from_numpy(users_with(args.rows, dataset))
    for split in HELD_OUT:
        users, ranks, _ = rank_users(model, dataset, split, cfg.eval)
        for words, group in (("with such a row", chosen[users]), ("all others", ~chosen[users])):
            count = int(group.sum())
            sums = ranking_sums(ranks[group])
            means = (f"{name} {sums[name] / max(count, 1):.4f}" for name in ("HR@10", "NDCG@10"))
            print(f"{split:<6} {words:<16} {count:>7,} users   {'   '.join(means)}")


if __name__ == "__main__":
    run_script(main)
