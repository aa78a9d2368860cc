"""What a ranker (--task=ctr) costs: to rank many candidates, and to train, beside the same done one by one.

    pip install -r requirements-dev.txt
    python scripts/bench_ctr.py --out=bench_ctr.json
    python scripts/bench_ctr.py --out=large.json --dim=128 --n_layers=4 --n_heads=4 --only=ranking

ranking    milliseconds for C candidates of each user, made up, after a history of max_len: the history worked
           through once for all of them, or anew for each. The latter is measured for a few and multiplied.
           And how the time for the most candidates depends on how many of them are ranked at once.
training   impressions a second, forward, backward and optimizer, of real batches: a sequence with a loss at
           each of its candidates, or each impression a row of its own with its own history. Both are the
           same model on the same impressions and take a step after the same ones; rows go in parts of
           --row_batch, sorted by length.

One process on the CPU; `--threads=1` is what a rank of torchrun has. Rounds alternate between all that is
compared; times are medians. All flags of main.py that name data, model and training count.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the spine

import costs
import numpy as np
import torch
from torch import Tensor

import main as program
import model as spine
from data import Impressions, load_dataset
from reclm.config import Config, ModelConfig, build_config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.data.features import choose_inputs
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.run import dist

ONE_BY_ONE = 10  # candidates that are measured with a history anew for each
NUM_ITEMS, NUM_ACTIONS = 10_000, 5  # made up


def interleaved(works: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each, all of them in every round, after a round that is not counted."""
    times = defaultdict(list)
    for i in range(rounds + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if i:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def made_up_batch(cfg: ModelConfig, users: int, candidates: int) -> dict[str, Tensor]:
    """Full histories, and candidates after all of them."""
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
    """A batch with some of its candidates."""
    return {name: x[:, part] if name.startswith("candidate_") else x for name, x in batch.items()}


@torch.inference_mode()
def ranking(cfg: Config, users: int, counts: list[int], sizes: list[int], rounds: int) -> dict:
    """Milliseconds to rank each number of candidates of each user: `once`, one by one (`anew`), and of the
    most of them by how many are ranked `at_once`."""
    torch.manual_seed(cfg.train.seed)
    vocabulary = Vocabulary(NUM_ITEMS, users, num_actions=NUM_ACTIONS)
    model = spine.SequenceRecommender(cfg.model, cfg.loss, vocabulary).eval()
    batch, default = made_up_batch(cfg.model, users, max(ONE_BY_ONE, *counts)), spine.CANDIDATES_AT_ONCE
    sizes = sorted({*sizes, default})

    def anew() -> None:
        for i in range(ONE_BY_ONE):
            model(some(batch, slice(i, i + 1)))

    def at_once(size: int) -> None:
        spine.CANDIDATES_AT_ONCE = size
        model(some(batch, slice(max(counts))))
        spine.CANDIDATES_AT_ONCE = default

    works = {count: lambda count=count: model(some(batch, slice(count))) for count in counts}
    works |= {"anew": anew}
    works |= {f"at once {size}": lambda size=size: at_once(size) for size in sizes}
    ms = {name: 1e3 * value for name, value in interleaved(works, rounds).items()}
    return {
        "users": users,
        "history": cfg.model.max_len,
        "once": {count: ms[count] for count in counts},
        "anew": {count: ms["anew"] / ONE_BY_ONE * count for count in counts},
        "at_once": {size: ms[f"at once {size}"] for size in sizes},
        "default": default,
    }


class Rows(Impressions):
    """Impressions of which each is a sequence of its own: the last max_len actions before it."""

    def __init__(self, dataset: Dataset, rows: np.ndarray, max_len: int):
        self.dataset, self.rows, self.first = dataset, rows, np.arange(len(rows))
        self.users = np.searchsorted(dataset.offsets, rows, side="right") - 1
        self.counts = np.ones_like(rows)
        self.skipped = np.maximum(0, dataset.history_lengths[rows] - max_len)
        self.starts = dataset.offsets[self.users] + self.skipped
        self.lengths = dataset.history_lengths[rows] - self.skipped

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        order = np.argsort(-self.lengths, kind="stable")
        return [self.build(order[first : first + size]) for first in range(0, len(order), size)]


def training(cfg: Config, num_batches: int, row_batch: int, rounds: int) -> dict:
    """Impressions a second in both forms, of the first batches of an epoch. Raises UserError."""
    dataset = choose_inputs(load_dataset(cfg.data, cfg.model.task), cfg)
    run = program.Run(cfg, dataset, None, None)
    run.model.train()
    sequences = list(islice(run.batches.epoch(0), num_batches))
    rows = []
    for step, parts, num_targets in sequences:
        asked = torch.cat([part["rows"][part["targets"] > 0] for part in parts]).numpy()
        rows.append((step, Rows(dataset, asked, cfg.model.max_len).batches(row_batch), num_targets))
    seconds = interleaved(
        {
            "sequences": lambda: [costs.step(run, batch) for batch in sequences],
            "rows": lambda: [costs.step(run, batch) for batch in rows],
        },
        rounds,
    )
    impressions = sum(num_targets for *_, num_targets in sequences)
    rates = {name: impressions / value for name, value in seconds.items()}
    sizes = {"dataset": dataset.name, "impressions": impressions, "steps": len(sequences)}
    return sizes | {"impressions_per_s": rates, "ratio": rates["sequences"] / rates["rows"]}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---:"] * len(head), *rows])


def describe_ranking(found: dict) -> str:
    once, anew, at_once = found["once"], found["anew"], found["at_once"]
    rows = [
        [
            f"{count:,}", f"{ms:.1f}", f"{ms / once[min(once)]:.1f}",
            f"{1e3 * ms / count / found['users']:.0f}", f"{anew[count]:,.0f}", f"{anew[count] / ms:.1f}",
        ]
        for count, ms in once.items()
    ]  # fmt: skip
    ratio, default = f"over {min(once):,}", found["default"]
    head = ["candidates", "ms", ratio, "us a candidate", "history anew, ms (extrapolated)", "times as long"]
    sizes = [[f"{size:,}", f"{ms:.1f}", f"{ms / at_once[default]:.2f}"] for size, ms in at_once.items()]
    over = f"over {default} at once"
    return (
        f"{found['users']} users with {found['history']} actions\n\n{table(head, rows)}\n\n"
        f"{max(once):,} candidates\n\n{table(['at once', 'ms', over], sizes)}"
    )


def describe_training(found: dict) -> str:
    rates = found["impressions_per_s"]
    rows = [[name, f"{rate:,.0f}", f"{rate / rates['rows']:.1f}"] for name, rate in rates.items()]
    return (
        f"{found['impressions']:,} impressions of {found['dataset']} in {found['steps']} steps\n\n"
        + table(["form", "impressions/s", "over rows"], rows)
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read_args() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("bench_ctr.json"))
    parser.add_argument("--only", choices=["ranking", "training"], help="not given: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--users", type=int, default=8, help="in a batch to rank")
    parser.add_argument("--candidates", type=numbers, default=[1, 10, 100, 1_000, 10_000])
    parser.add_argument("--at_once", type=numbers, default=[16, 64, 128, 256, 1_000])
    parser.add_argument("--batches", type=int, default=2, help="steps that are timed together")
    parser.add_argument("--row_batch", type=int, default=256, help="rows in a part of a step")
    args, flags = parser.parse_known_args()
    if args.out.exists():
        raise UserError(f"--out={args.out} is there and is not overwritten")
    return args, build_config(parse_args(flags) | {"task": "ctr", "device": "cpu"})


def main() -> None:
    args, cfg = read_args()
    torch.set_num_threads(args.threads)
    dist.keep_freed_memory()
    found = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": runs.commit(), "machine": runs.machine()}
    found |= {"threads": args.threads, "rounds": args.rounds, "config": cfg.flat()}
    if args.only != "training":
        found["ranking"] = ranking(cfg, args.users, args.candidates, args.at_once, args.rounds)
        print(describe_ranking(found["ranking"]), flush=True)
    if args.only != "ranking":
        found["training"] = training(cfg, args.batches, args.row_batch, args.rounds)
        print(describe_training(found["training"]), flush=True)
    args.out.write_text(json.dumps(found, indent=1))
    print(f"written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
