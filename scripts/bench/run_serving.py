"""Recommend to all users once with Toy-RecLM. Started by scripts/bench/serve.py, also under torchrun."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure  # noqa: F401  puts the spine on sys.path

from reclm.run import dist
from reclm.serve import Filters, Recommender
from reclm.serve.everybody import recommend_to_all


def main(spec: dict) -> dict:
    """Seconds from a loaded model and the indices of users to arrays of users, items and scores."""
    recommender = Recommender.load(spec["model"])
    users = len(recommender.histories)
    dist.barrier()
    begin = time.perf_counter()
    recommend_to_all(recommender, 10, Filters())
    return {"eval_seconds": time.perf_counter() - begin, "eval_users": users}


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    with dist.distributed():
        result = main(spec)
        dist.on_main(lambda: Path(spec["result"]).write_text(json.dumps(result)))
