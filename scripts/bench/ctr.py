"""Measure a CTR model: ranking many candidates per user, and training, shared history against one by one.

    pip install -r requirements-dev.txt
    python scripts/bench/ctr.py --out=ctr.json
    python scripts/bench/ctr.py --out=large.json --dim=128 --n_layers=4 --n_heads=4 --only=ranking

ranking    milliseconds for C synthetic candidates per user after a history of max_len. The history is encoded
           once for all candidates, or again for each (extrapolated from 10 candidates). Also the time for
           the largest C by the number of candidates that are ranked at once.
training   impressions per second on real batches, forward, backward and optimizer: sequences with a loss at
           each of their candidates, or one row per impression with its own history. Both train the same model
           with the same impressions per step; rows are sorted by length and go in parts of --row_batch.

Runs in one process on the CPU; --threads=1 is what a process of torchrun has. Rounds alternate between the
variants; times are medians. The flags of main.py for data, model and training apply.
"""

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import measure  # before torch
import numpy as np
import torch
from costs import new_run, step
from measure import seconds, show
from torch import Tensor

import data
import model as spine
from reclm.config import Config, ModelConfig, build_config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.data.features import choose_inputs
from reclm.errors import run_script
from reclm.flags import parse_args
from reclm.run.process import keep_freed_memory

ONE_BY_ONE = 10  # candidates measured with the history encoded again for each
NUM_ITEMS, NUM_ACTIONS = 10_000, 5  # of the synthetic data


def made_up_batch(cfg: ModelConfig, users: int, candidates: int) -> dict[str, Tensor]:
    """A batch of synthetic histories of max_len actions, each followed by `candidates` candidates."""
    rng = torch.Generator().manual_seed(0)

    def draw(width: int, high: int) -> Tensor:
        return torch.randint(1, high + 1, (users, width), generator=rng)

    times = draw(cfg.max_len + candidates, 10**6).double().cumsum(1)
    history, shown = times.split([cfg.max_len, candidates], dim=1)
    return {
        "item_ids": draw(cfg.max_len, NUM_ITEMS),
        "lengths": torch.full((users,), cfg.max_len),
        "user_ids": torch.arange(users),
        "num_before": torch.zeros(users, dtype=torch.long),
        "actions": draw(cfg.max_len, NUM_ACTIONS),
        "timestamps": history,
        "next_timestamps": torch.cat([history[:, 1:], shown[:, :1]], dim=1),
        "candidate_ids": draw(candidates, NUM_ITEMS),
        "history_lengths": torch.full((users, candidates), cfg.max_len),
        "candidate_times": shown,
    }


def some(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The batch with only this slice of its candidates."""
    of_candidates = ("candidate_ids", "history_lengths", "candidate_times")
    return {name: x[:, part] if name in of_candidates else x for name, x in batch.items()}


@torch.inference_mode()
def ranking(cfg: Config, users: int, counts: list[int], sizes: list[int], rounds: int) -> dict:
    """Milliseconds to rank each number of candidates per user (`counts`), and the largest by the number that
    is ranked at once (`sizes`)."""
    torch.manual_seed(cfg.train.seed)
    vocabulary = Vocabulary(NUM_ITEMS, users, code_sizes={"actions": NUM_ACTIONS})
    model = spine.SequenceRecommender(cfg.model, cfg.loss, vocabulary).eval()
    batch, default = made_up_batch(cfg.model, users, max(ONE_BY_ONE, *counts)), spine.CANDIDATES_AT_ONCE
    sizes = sorted({*sizes, default})

    def once(count: int) -> None:
        model(some(batch, slice(count)))

    def per_candidate() -> None:
        for i in range(ONE_BY_ONE):
            model(some(batch, slice(i, i + 1)))

    def at_once(size: int) -> None:
        with mock.patch.object(spine, "CANDIDATES_AT_ONCE", size):
            once(max(counts))

    works = [
        *(partial(once, count) for count in counts),
        *(partial(at_once, size) for size in sizes),
        per_candidate,
    ]
    *ms, of_few = (1e3 * value for value in seconds(works, rounds))
    by_count, by_size = dict(zip(counts, ms, strict=False)), dict(zip(sizes, ms[len(counts) :], strict=True))
    of_one = of_few / ONE_BY_ONE
    return {
        "users": users,
        "history": cfg.model.max_len,
        "by number": [
            {
                "candidates": count,
                "ms": ms,
                "times the first": ms / by_count[counts[0]],
                "us per candidate": 1e3 * ms / count / users,
                "history encoded per candidate, ms (extrapolated)": of_one * count,
                "times as long": of_one * count / ms,
            }
            for count, ms in by_count.items()
        ],
        f"by number at once, of {max(counts):,}": [
            {"at once": size, "ms": ms, f"times that of {default}": ms / by_size[default]}
            for size, ms in by_size.items()
        ],
    }


def one_by_one(dataset: Dataset, max_len: int) -> data.Impressions:
    """The training impressions, one sequence per impression."""
    with mock.patch.object(data, "MAX_CANDIDATES", 1):
        return data.Impressions(dataset, max_len)


def row_batches(single: data.Impressions, rows: np.ndarray, size: int) -> list[dict[str, Tensor]]:
    """These rows of the dataset as batches of `size`, longest histories first."""
    places = np.searchsorted(single.rows, rows)
    order = places[np.argsort(-single.lengths[places], kind="stable")]
    return [single.build(order[first : first + size]) for first in range(0, len(order), size)]


def training(cfg: Config, num_batches: int, row_batch: int, rounds: int) -> dict:
    """Impressions per second of both forms over the first `num_batches` steps of an epoch. Raises UserError
    if the data cannot be used."""
    dataset = choose_inputs(data.load_dataset(cfg.data, cfg.model.task), cfg)
    run, single = new_run(cfg, dataset), one_by_one(dataset, cfg.model.max_len)
    sequences, rows = list(islice(run.batches.epoch(0), num_batches)), []
    for number, parts, num_targets in sequences:
        asked = torch.cat([part["rows"][part["labels"] >= 0] for part in parts]).numpy()
        rows.append((number, row_batches(single, asked, row_batch), num_targets))

    def train(batches: list[tuple]) -> None:
        for batch in batches:
            step(run, batch)

    taken = seconds([lambda: train(sequences), lambda: train(rows)], rounds)
    impressions = sum(num_targets for *_, num_targets in sequences)
    of_sequences, of_rows = (impressions / value for value in taken)
    return {
        "dataset": dataset.name,
        "impressions": impressions,
        "steps": len(sequences),
        "impressions_per_s": {"sequences": of_sequences, "rows": of_rows},
        "ratio": of_sequences / of_rows,
    }


def numbers(text: str) -> list[int]:
    """Argument type: comma-separated integers."""
    return [int(part) for part in text.split(",")]


def read_args() -> tuple[argparse.Namespace, Config]:
    parser = measure.arguments(__doc__, "ctr.json")
    parser.add_argument("--only", choices=["ranking", "training"], help="one part [default: both]")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch [default: %(default)s]")
    parser.add_argument("--users", type=int, default=8, help="users per batch to rank [default: %(default)s]")
    parser.add_argument(
        "--candidates", type=numbers, default=[1, 10, 100, 1_000, 10_000], help="candidates per user"
    )
    parser.add_argument(
        "--at_once", type=numbers, default=[16, 64, 128, 256, 1_000], help="candidates ranked at once"
    )
    parser.add_argument("--batches", type=int, default=2, help="steps timed together [default: %(default)s]")
    parser.add_argument("--row_batch", type=int, default=256, help="rows per pass [default: %(default)s]")
    args, flags = parser.parse_known_args()
    return args, build_config(parse_args(flags) | {"task": "ctr", "device": "cpu"})


def main() -> None:
    args, cfg = read_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    found = {"threads": args.threads, "rounds": args.rounds, "config": cfg.flat()}
    if args.only != "training":
        found["ranking"] = ranking(cfg, args.users, args.candidates, args.at_once, args.rounds)
        show("ranking", found["ranking"])
    if args.only != "ranking":
        found["training"] = training(cfg, args.batches, args.row_batch, args.rounds)
        show("training", found["training"])
    measure.write(args.out, found)


if __name__ == "__main__":
    run_script(main)
