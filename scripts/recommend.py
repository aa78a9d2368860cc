"""Recommend items to a person, with a trained model alone: the raw data are not needed.

    python scripts/recommend.py --user=1                                    # a user of the training data
    python scripts/recommend.py --history="Toy Story (1995); heat; matrix"  # anybody: titles or ids
    python scripts/recommend.py --history=films.txt --genres=Comedy,Crime --years=1990:1999 --why
    python scripts/recommend.py --similar="Heat (1995)"
    python scripts/recommend.py --users=all --out=recommended.parquet       # everybody; also under torchrun
    python scripts/recommend.py --candidates=pairs.csv --out=scored.csv     # your own pairs of user and item

A history is separated by semicolons, or a text file with one item per line, oldest first. Where the model
reads ratings and times, they follow the item: "Heat (1995)=5@2001-05-01T20:00; ..."; items without times are
taken to be used at the time of the request. Items of the history are left out, of the whole
history, even where the model sees only the last part of it. Filters come before the best k are taken.

With a checkpoint of --task=ctr, the score is the probability of a positive action. --candidates is a text
file with an item per line, the only ones to choose from; or a table (CSV, JSON lines, Parquet) with columns
user, item and perhaps timestamp, the time at which the item is shown: then each row is scored after the
complete history of its user, and all are written to --out, each user's best first.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported, see reclm/serve/__init__.py

import argparse
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, check_out, write_whole
from reclm.serve import Filters, Item, Person, Recommender
from reclm.serve.choose import add_model_flags, add_quantize, model_path, open_recommender
from reclm.serve.typed import read_filters, read_person

SHOWN = 5  # of the last actions of a user
AMONG = 200  # items that --rerank orders
TEXT = (".txt", "")  # suffixes of lists; others are tables
TABLES = (".parquet", ".csv")  # suffixes of --out


def parse() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    who = parser.add_argument_group("for whom")
    who.add_argument("--user", help="id of a user of the training data")
    who.add_argument("--history", help="items, separated by semicolons, or a text file with one per line")
    who.add_argument("--users", choices=["all"], help="everybody in the training data, written to --out")
    who.add_argument("--similar", metavar="ITEM", help="no person: the items most like this one")
    who.add_argument("--profile", help="of a --history, where the model reads it: gender=F,age=25")
    who.add_argument("--at", help="time of the request, where the model reads times: 2001-05-01T20:00 (UTC)")
    what = parser.add_argument_group("what")
    what.add_argument("--k", type=int, default=10, help="number of items [10]")
    what.add_argument("--genres", help="only items of one of these genres: Comedy,Crime")
    what.add_argument("--years", help="only items of these years: 1990:1999")
    what.add_argument("--exclude", help="not these items, separated by semicolons")
    what.add_argument("--candidates", type=Path, help="file with the items to choose from, or a table")
    what.add_argument("--min_count", type=int, default=0, help="only items with so many actions in the data")
    what.add_argument("--include_seen", action="store_true", help="also items of the history")
    what.add_argument("--why", action="store_true", help="the items of the history that speak most for each")
    what.add_argument("--rerank", metavar="CTR.pth", help=f"order the best {AMONG} by a model of --task=ctr")
    which = parser.add_argument_group("with which model")
    add_model_flags(which)
    add_quantize(which)
    which.add_argument("--adapter", type=Path, help="adapter.safetensors of this checkpoint")
    parser.add_argument("--out", type=Path, help="file to write, .parquet or .csv")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    pairs = args.candidates is not None and args.candidates.suffix.lower() not in TEXT
    chosen = [name for name in ("user", "history", "users", "similar") if getattr(args, name) is not None]
    if len(chosen) != (0 if pairs else 1):
        wanted = "none with a table of candidates" if pairs else "exactly one"
        raise UserError(f"choose {wanted} of --user, --history, --users=all and --similar (see --help)")
    to_file = pairs or args.users is not None
    if to_file != (args.out is not None):
        raise UserError(
            "--users=all and tables of candidates need --out=FILE.parquet or .csv, others have none"
        )
    if args.k < 1:
        raise UserError(f"--k={args.k} must be at least 1")
    if to_file:
        check_out(args, TABLES, [args.candidates] if pairs else [])
        from reclm.run.dist import distributed  # torch, which others can do without

        with distributed():
            (score_pairs if pairs else recommend_to_everybody)(args)
    elif args.similar is not None:
        recommender = open_recommender(args)
        items = recommender.similar(args.similar, args.k, filters_of(args, recommender))
        show(items, args.k, "cosine")
    else:
        recommend_to_one(args)


def recommend_to_one(args: argparse.Namespace) -> None:
    recommender = open_recommender(args)
    person = person_of(args, recommender, of_two=bool(args.rerank))
    filters = filters_of(args, recommender)
    scorer, reader = recommender, person
    if args.rerank:
        scorer = Recommender.load(model_path(args.rerank), quantize=args.quantize)
        reader = person_of(args, scorer)
        items = rerank(recommender, person, filters, scorer, reader, args.k)
    else:
        items = recommender.recommend(person, args.k, filters)
    reasons = scorer.why(reader, [item.id for item in items]) if args.why else []
    if args.user is not None:
        show_person(recommender, person, args.user)
    lines = ["because of " + ", ".join(f"{r.title} ({r.drop:+.2f})" for r in row) for row in reasons]
    show(items, args.k, "probability" if scorer.is_ctr else "score", lines)


def rerank(
    recommender: Recommender, person: Person, filters: Filters, ctr: Recommender, reader: Person, k: int
) -> list[Item]:
    """Two stages: the best AMONG of the matching model, ordered by the model of --task=ctr, which reads the
    person as `reader`. Raises UserError unless both number the same items."""
    if not ctr.is_ctr or recommender.is_ctr:
        raise UserError("--rerank takes a checkpoint of --task=ctr, and --ckpt_name one of --task=matching")
    if ctr.catalogue.ids != recommender.catalogue.ids:
        raise UserError(
            f"--rerank: the models know different items ({len(recommender.catalogue):,} and "
            f"{len(ctr.catalogue):,}): train both on the same data with the same --min_positives"
        )
    found = [item.id for item in recommender.recommend(person, max(AMONG, k), filters)]
    numbers = tuple(map(ctr.catalogue.id_number, found))
    return ctr.recommend(reader, k, Filters(candidates=numbers, include_seen=True)) if numbers else []


def recommend_to_everybody(args: argparse.Namespace) -> None:
    from reclm.run import dist
    from reclm.run.logger import say
    from reclm.serve.everybody import as_table, recommend_to_all, write_table

    recommender = open_recommender(args)
    columns = recommend_to_all(recommender, args.k, filters_of(args, recommender))
    users = recommender.histories.users
    table = as_table(columns, users, recommender.catalogue)
    dist.on_main(lambda: write_whole(args.out, lambda path: write_table(table, path)))
    fewer = np.count_nonzero(np.bincount(columns["user"], minlength=len(users)) < args.k)
    note = f"; fewer than {args.k} were allowed for {fewer:,} users" if fewer else ""
    say(f"{len(table):,} items for {len(users):,} users, written to {args.out}{note}")


def score_pairs(args: argparse.Namespace) -> None:
    """Score each row of a table of candidates; one process does it."""
    from reclm.run import dist
    from reclm.run.logger import say
    from reclm.serve.pairs import read_pairs, score_pairs

    def score_and_write() -> int:
        from reclm.serve.everybody import write_table

        recommender = open_recommender(args)
        table = score_pairs(recommender, read_pairs(args.candidates))
        write_whole(args.out, lambda path: write_table(table, path))
        return len(table)

    say(f"{dist.on_main(score_and_write):,} candidates, written to {args.out}")


def person_of(args: argparse.Namespace, recommender: Recommender, of_two: bool = False) -> Person:
    return read_person(recommender, args.user, args.history, args.profile, args.at, of_two)


def filters_of(args: argparse.Namespace, recommender: Recommender) -> Filters:
    return read_filters(
        recommender.catalogue,
        args.genres,
        args.years,
        args.exclude,
        args.candidates,
        min_count=args.min_count,
        include_seen=args.include_seen or None,
    )


def show_person(recommender: Recommender, person: Person, user: str) -> None:
    """Print the last actions of a user."""
    print(f"User {user}, {len(person):,} actions, the last of them:")
    for place in range(max(0, len(person) - SHOWN), len(person)):
        when = ""
        if len(person.times):
            when = f"{datetime.fromtimestamp(person.times[place], UTC):%Y-%m-%d}  "
        print(f"     {when}{recommender.item(int(person.items[place])).title}")
    print()


def show(items: Sequence[Item], k: int, measure: str, reasons: Sequence[str] = ()) -> None:
    """Print a table of items with what their score is, below each the reason for it, if there is one; and
    whether there are fewer than k."""
    width = shutil.get_terminal_size().columns
    genres = min(max((len(item.genres) for item in items), default=0), 30)
    titles = min(max((len(item.title) for item in items), default=5), width - genres - len(measure) - 10)
    print(f"{'':>4}  {'title':<{titles}}  {'genres' if genres else '':<{genres}}  {measure}".rstrip())
    for place, item in enumerate(items, 1):
        title, genre = fit(item.title, titles), fit(item.genres, genres)
        print(f"{place:>4}  {title:<{titles}}  {genre:<{genres}}  {item.score:>{len(measure)}.3f}")
        if reasons:
            print(f"      {reasons[place - 1]}")
    if len(items) < k:
        print(f"No more than {len(items)} items are allowed by the filters and new to this person.")


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


if __name__ == "__main__":
    run_script(main)
