"""Rank your own candidates with a trained ranker: how likely is it that each user likes each item?

    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv
    python scripts/rank.py --candidates=candidates.csv --out=ranked.csv --ckpt_name=runs/ctr/best.pth

candidates.csv has the columns user and item, and may have a timestamp: when they are shown (else at the last
moment of the data). All that a user ever did is known. Written are the same rows with the probability of a
positive action, the best of each user first. All flags of `main.py --eval_only=true` count.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import score_impressions
from main import open_checkpoint
from reclm.data.impressions import ask
from reclm.data.readers import READERS
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.run import checkpoint


def rank(candidates: Path, out: Path, said: dict) -> None:
    path = checkpoint.find_checkpoint(said.get("ckpt_name", "best.pth"), runs.chosen_dir(said))
    if not candidates.is_file():
        raise UserError(f"--candidates={candidates}: no such file")
    table = READERS["csv"]((candidates,)).interactions
    cfg, dataset, model = open_checkpoint(said, path)
    if cfg.model.task != "ctr":
        raise UserError(f"{path} is of --task={cfg.model.task}: train a ranker with --task=ctr")
    asked, order = ask(dataset, table)
    logits, _, _ = score_impressions(model, asked, "asked", cfg.eval)
    table = table.iloc[order].assign(probability=logits.double().sigmoid().numpy())
    by_user = table["user"].map({user: i for i, user in enumerate(dict.fromkeys(table["user"]))})
    table = table.assign(place=by_user).sort_values(["place", "probability"], ascending=[True, False])
    table.drop(columns="place").to_csv(out, index=False, float_format="%.6g")
    print(f"{len(table):,} candidates of {by_user.nunique():,} users, written to {out}")


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
