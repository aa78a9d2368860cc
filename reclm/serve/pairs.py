"""Score pairs of user and item from a table: how much would each user like each item?"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from reclm.data.columns import IDS, Wishes
from reclm.data.own import read_own
from reclm.errors import UserError
from reclm.serve.recommender import Recommender


def read_pairs(path: Path) -> pd.DataFrame:
    """The table with columns user and item (texts) and perhaps timestamp. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--candidates={path} does not exist: name a table with columns user and item")
    table, _ = read_own((path,), Wishes())
    if table.empty:
        raise UserError(f"{path} has no rows: nothing to score")
    names = [*IDS, *(["timestamp"] if "timestamp" in table else [])]
    return table[names].astype(dict.fromkeys(IDS, str)).reset_index(drop=True)


def score_pairs(recommender: Recommender, table: pd.DataFrame) -> pa.Table:
    """The rows of `read_pairs` with their score (with a model of --task=ctr a probability), place and, where
    there are any, title: users in the order of the table, each one's best item first. A row is scored after
    the complete history of its user, whatever its timestamp. Raises UserError for an unknown user or item."""
    known = {user: index for index, user in enumerate(recommender.histories.users.tolist())}
    check(table["user"], known, "user")
    check(table["item"], recommender.catalogue.by_id, "item")
    parts = []
    for user, rows in table.groupby("user", sort=False):
        numbers = rows["item"].map(recommender.catalogue.by_id).to_numpy(np.int64, copy=True)
        person = recommender.user_at(known[user])
        if recommender.is_ctr:
            times = rows["timestamp"].to_numpy(np.float64, copy=True) if "timestamp" in rows else None
            scores = recommender.probabilities(person, numbers, times)
        else:
            scores = recommender.scores_of([person], numbers)[0]
        best = np.argsort(-scores, kind="stable")
        rows = rows.iloc[best].assign(place=np.arange(1, len(rows) + 1), score=scores[best])
        if recommender.catalogue.titled:
            rows["title"] = [recommender.catalogue.titles[number - 1] for number in numbers[best]]
        parts.append(rows)
    return pa.Table.from_pandas(pd.concat(parts), preserve_index=False)


def check(ids: pd.Series, known: dict[str, int], what: str) -> None:
    """Raises UserError if an id is unknown."""
    missing = np.flatnonzero(~ids.isin(known))
    if len(missing):
        raise UserError(
            f"candidate {missing[0] + 1}: {what} {ids.iloc[missing[0]]} is not in the data "
            f"(as in {len(missing):,} candidates): remove such rows"
        )
