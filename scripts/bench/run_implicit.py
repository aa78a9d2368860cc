"""Measure implicit's ALS once. Started by scripts/bench/serve.py in implicit's own environment.

It knows no order: a user is a vector from matrix factorisation, so it is the speed of a table lookup and a
matrix product, without a pass through a model."""

import json
import os
import sys
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its own threads are faster; with both it warns

import numpy as np
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix


def main(spec: dict) -> dict:
    """One measurement: seconds of recommending ten unseen items to every user."""
    users, items = np.loadtxt(spec["csv"], np.int64, delimiter=",", skiprows=1, usecols=(0, 1)).T
    actions = csr_matrix((np.ones(len(users), np.float32), (users, items)))
    model = AlternatingLeastSquares(factors=spec["dim"], num_threads=spec["threads"], random_state=0)
    model.fit(actions, show_progress=False)
    asked = np.unique(users)
    begin = time.perf_counter()
    model.recommend(asked, actions[asked], N=10, filter_already_liked_items=True)
    return {"eval_seconds": time.perf_counter() - begin, "eval_users": len(asked)}


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(spec["result"]).write_text(json.dumps(main(spec)))
