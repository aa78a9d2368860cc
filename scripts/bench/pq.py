"""Measure --item_table=pq: quality and bytes on MovieLens-1M; bytes, time and memory with a million items.

    pip install -r requirements-dev.txt
    python scripts/bench/pq.py --runs=runs/pq                      # everything; continues where it stopped
    python scripts/bench/pq.py --parts=bytes,ranking,memory
    python scripts/bench/pq.py --parts=ml-1m --seeds=1 --out=try.json --dataset=ml-100k --num_epochs=1

ml-1m    test NDCG@10 of configs/speedrun.yaml with each table, and its bytes; "of dense" with its standard
         error, paired by user. Trains by main.py in --runs, as many seeds as --seeds, or continues there;
         finished runs are read. Unknown flags go to main.py
bytes    of all weights and codes of a model, by width and number of codes
ranking  ms to score all items and choose ten that are new, as a Recommender does, for one user and 64 at once
memory   peak MiB of training steps, and of assigning the codes
quality  NDCG@10 after the same training steps on a made-up catalogue with structure, and their seconds

All but ml-1m use one thread, and the made-up catalogue: --items in groups of 100, of which users have a few
that lie close to each other, with a power law of popularity within each (`made_up`). The file --out is a
record: parts that are measured again are replaced, the others stay. Linux only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import costs
import measure  # before torch
import numpy as np
import shrink
import torch
from measure import say, show
from trainings import ROOT, trained

from evaluate import evaluate
from model import SequenceRecommender
from reclm.adapt.quantize import num_bytes
from reclm.config import Config, LossConfig, ModelConfig, build_config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.errors import UserError, run_script
from reclm.nn.pq import assign_codes, choose_centroids
from reclm.run.optim import learning_rate
from reclm.run.output import ScriptParser, write_whole
from reclm.run.process import keep_freed_memory
from reclm.run.report import stamp
from reclm.serve import Catalogue, Filters, Person, Recommender
from reclm.serve.about import About
from reclm.serve.person import Reads
from reclm.serve.recommender import AT_ONCE
from reclm.serve.small_tables import PQTable

RECORD = ROOT / "configs" / "records" / "pq.json"
FROM_DENSE = "pq, m = 16, k = 256, from dense"
SIZES = [(64, 4), (64, 8), (128, 8), (256, 8), (256, 16)]  # (dim, pq_codes) of bytes and ranking
GROUP, NEAR, LATENT = 100, 10, 8  # items of a group, groups of a user, dimensions in which they lie
LENGTH = 30  # actions of a user, on average
SEEN = 100  # items of each user of `ranking`
RANKED = 2_000  # users of the made-up catalogue who are ranked


# ---------------------------------------------------------------- MovieLens-1M


def ml_1m(args: argparse.Namespace) -> dict:
    """{"rows": one per table}, training what is missing"""
    tables = {f"pq, m = {m}": ([f"--pq_codes={m}"], "none") for m in args.codes}
    from_dense = ["--pq_codes=16", "--pq_centroids=256", "--init_from={dense}"]
    tables |= {FROM_DENSE: (from_dense, "none"), f"{FROM_DENSE}, int8": (from_dense, "int8")}
    dense, rows = [train(args, "dense", [], seed) for seed in range(args.seeds)], []
    base = shrink.quality([folder / "best.pth" for folder in dense], "none", {})
    for name, (flags, kind) in ({"dense": ([], "none")} | tables).items():
        folders, found = dense, base
        if flags:
            runs = [[flag.format(dense=folder / "best.pth") for flag in flags] for folder in dense]
            run = name.removesuffix(", int8")
            folders = [train(args, run, ["--item_table=pq", *runs[seed]], seed) for seed in range(args.seeds)]
            found = shrink.quality([folder / "best.pth" for folder in folders], kind, {})
        size, whole = (one["bytes of the item table"][0] for one in (found, base))
        kept = shrink.share_kept(found["NDCG@10"], base["NDCG@10"])
        rows.append(
            {
                "table": name,
                "bytes of the table": size,
                "times smaller": f"{whole / size:.1f}",
                **{f"test {m}": shrink.text(shrink.spread(found[m])) for m in ("NDCG@10", "HR@10")},
                "of dense NDCG@10": "{mean:.1%} ± {se:.1%}".format(**kept) if flags else "",
                "s per epoch": f"{np.median([seconds for run in folders for seconds in epochs_of(run)]):.0f}",
            }
        )
    return {"seeds": args.seeds, "flags": " ".join(args.flags) or "none", "rows": rows}


def train(args: argparse.Namespace, name: str, flags: list[str], seed: int) -> Path:
    """The folder of a finished run. Raises UserError where main.py fails."""
    folder = args.runs / f"{name.replace(', ', '-').replace(' = ', '').replace(' ', '-')}-{seed}"
    given = ["--config=configs/speedrun.yaml", *flags, f"--seed={seed}", *args.flags]
    return trained(folder, given, args.processes)


def epochs_of(folder: Path) -> list[float]:
    """Training seconds per epoch"""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_seconds"] for line in lines]


# ---------------------------------------------------------------- a million items


def made_up(items: int, users: int, seed: int = 0) -> Dataset:
    """A catalogue with structure. Groups of GROUP items lie in a space of LATENT dimensions. A user has the
    NEAR groups around a point of it, and with each action stays in the group of the last one (6 of 10 times)
    or goes to another, the more likely the nearer it is. Within a group the r-th item has popularity 1 / r;
    nobody uses an item twice."""
    rng = np.random.default_rng(seed)
    count = items // GROUP
    centres = rng.standard_normal((count, LATENT), dtype=np.float32)
    lengths = rng.integers(LENGTH // 2, 3 * LENGTH // 2 + 1, users)
    width = lengths.max()
    parts = []
    for first in range(0, users, 512):
        size = min(512, users - first)
        points = centres[rng.integers(0, count, size)] + 0.3 * rng.standard_normal((size, LATENT))
        distance = (centres**2).sum(1) - 2 * points @ centres.T  # (u, groups), but for a constant
        near = np.argpartition(distance, NEAR, axis=1)[:, :NEAR]
        near = np.take_along_axis(near, np.take_along_axis(distance, near, 1).argsort(1), 1)
        weights = 1 / np.arange(1, NEAR + 1)
        jumps = rng.choice(NEAR, (size, width), p=weights / weights.sum())
        moves = rng.random((size, width)) >= 0.6
        moves[:, 0] = True
        at = np.maximum.accumulate(np.where(moves, np.arange(width), 0), axis=1)
        place = np.take_along_axis(jumps, at, 1)  # (u, width): which of the user's groups
        # The n-th visit of a group takes the n-th of its items in an order drawn by popularity (Gumbel).
        keys = -np.log(np.arange(1, GROUP + 1)) + rng.gumbel(size=(size, NEAR, GROUP))
        order = (-keys).argsort(2)
        visit = np.zeros_like(place)
        for group in range(NEAR):
            here = place == group
            visit[here] = (here.cumsum(1) - 1)[here]
        chosen = order[np.arange(size)[:, None], place, visit]
        parts.append(np.take_along_axis(near, place, 1) * GROUP + chosen + 1)
    item_ids = np.concatenate(parts)[np.arange(width) < lengths[:, None]]
    offsets, none = np.concatenate([[0], lengths.cumsum()]), np.zeros(0)
    ids = {"users": np.arange(users), "items": np.arange(count * GROUP)}
    actions = {"item_ids": item_ids, "timestamps": none, "ratings": none}
    return Dataset("made-up", "none", notes=[], fingerprint="", offsets=offsets, **actions, **ids)


def first_users(dataset: Dataset, count: int) -> Dataset:
    offsets = dataset.offsets[: count + 1]
    item_ids = dataset.item_ids[: offsets[-1]]
    return replace(dataset, users=dataset.users[:count], offsets=offsets, item_ids=item_ids)


def settings(table: str, dim: int = 64, codes: int = 4, **others) -> Config:
    pq = {"pq_codes": codes} if table == "pq" else {}
    usual = {"loss": "sampled_softmax", "max_len": 50, "lr": 6e-3, "device": "cpu", "batch_size": 128}
    return build_config(usual | {"item_table": table, "dim": dim} | pq | others)


def random_model(table: str, items: int, dim: int, codes: int) -> SequenceRecommender:
    """A model with random weights and codes"""
    torch.manual_seed(0)
    cfg = settings(table, dim, codes)
    model = SequenceRecommender(cfg.model, cfg.loss, Vocabulary(items, 1)).eval().requires_grad_(False)
    if table == "pq":
        model.item_embedding.codes.random_(0, model.item_embedding.num_centroids)
    return model


def bytes_of_models(args: argparse.Namespace) -> dict:
    rows = []
    for dim, codes in SIZES:
        sizes = []
        for table in ("dense", "pq"):
            cfg = ModelConfig(dim=dim, **({"item_table": "pq", "pq_codes": codes} if table == "pq" else {}))
            with torch.device("meta"):
                model = Meta(cfg, LossConfig(), Vocabulary(args.items, 1))
            sizes.append(num_bytes(model))
        rows.append(
            {
                "D": str(dim),
                "m": str(codes),
                "dense, MB": f"{sizes[0] / 1e6:.1f}",
                "pq, MB": f"{sizes[1] / 1e6:.2f}",
                "times smaller": f"{sizes[0] / sizes[1]:.0f}",
            }
        )
    return {"rows": rows}


class Meta(SequenceRecommender):
    """A model of which only the shapes are asked for."""

    def init_weights(self) -> None:
        pass


def ranking(args: argparse.Namespace) -> dict:
    """Rows of ms to choose ten of all items but the SEEN ones of each user, from user embeddings on"""
    rows, rng = [], np.random.default_rng(0)
    for dim, codes in SIZES:
        tables = {
            "dense": rng.standard_normal((args.items + 1, dim), dtype=np.float32),
            "pq": PQTable(random_model("pq", args.items, dim, codes).item_embedding),
        }
        for users in (1, AT_ONCE):
            hidden = rng.standard_normal((users, dim), dtype=np.float32)
            people = [Person(rng.integers(1, args.items + 1, SEEN)) for _ in range(users)]
            works = [
                partial(recommender(table, args.items).best_of, hidden, people, 10, Filters())
                for table in tables.values()
            ]
            dense, pq = (1e3 * taken for taken in measure.seconds(works, 7 if users == 1 else 3))
            row = {"users": str(users), "D": str(dim), "m": str(codes), "dense, ms": f"{dense:.1f}"}
            rows.append(row | {"pq, ms": f"{pq:.1f}", "times faster": f"{dense / pq:.1f}"})
            show("ranking", rows[-1:])
    return {"rows": rows}


def recommender(table: np.ndarray | PQTable, items: int) -> Recommender:
    """One without a model"""
    about = About({"task": "matching"}, "random", "none", "never")
    reads = Reads(100, False, False, 0.0, {}, {}, False)
    return Recommender(
        SimpleNamespace(table=table), Catalogue(range(items), (), (), np.zeros(0)), reads, about
    )


def memory(args: argparse.Namespace) -> dict:
    tables = {
        f"dense, {args.items // 10:,} items": ("dense", args.items // 10),
        f"dense, {args.items:,} items": ("dense", args.items),
        f"pq, {args.items:,} items": ("pq", args.items),
    }
    rows = [
        {"table": name, "training steps, MiB": f"{costs.alone(peak_of_steps, *given):.0f}"}
        for name, given in tables.items()
    ]
    users, items = args.users, args.items
    seconds, mib = costs.alone(cost_of_codes, items, users)
    codes = {"users": users, "seconds": f"{seconds:.0f}", "MiB": f"{mib:.0f}"}
    return {"rows": rows, "codes": codes}


def peak_of_steps(table: str, items: int) -> float:
    """Peak MiB that a model, its optimizer and three steps add, with codes at random"""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = made_up(items, 1_000)
    most = choose_centroids(ONE, items)
    costs.program.assign_codes = lambda *_: torch.randint(0, most, (items + 1, 4), dtype=torch.uint8)
    before = measure.own_peak()
    run = costs.new_run(settings(table), dataset)
    batches = run.batches.epoch(0)
    for _ in range(3):
        costs.step(run, next(batches))
    return measure.own_peak() - before


def cost_of_codes(items: int, users: int) -> tuple[float, float]:
    """(seconds, peak MiB) of assign_codes"""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = made_up(items, users)
    assign_codes(first_users(dataset, 64), ONE, 0)  # loads code
    before, begin = measure.own_peak(), time.perf_counter()
    assign_codes(dataset, ONE, 0)
    return time.perf_counter() - begin, measure.own_peak() - before


ONE = ModelConfig(item_table="pq", pq_codes=4)


def quality(args: argparse.Namespace) -> dict:
    dataset = made_up(args.items, args.users)
    used = len(np.unique(dataset.item_ids[dataset.in_training]))
    tables = {"dense": ("dense", 4), "pq, m = 4": ("pq", 4), "pq, m = 8": ("pq", 8)}
    rows = []
    for name, (table, codes) in tables.items():
        rows.append({"table": name} | costs.alone(train_made_up, table, codes, args))
        show("quality", rows[-1:])
    sizes = {"items": args.items, "users": args.users, "epochs": args.epochs}
    return {"rows": rows} | sizes | {"actions": len(dataset.item_ids), "items trained on": used}


def train_made_up(table: str, codes: int, args: argparse.Namespace) -> dict[str, str]:
    """NDCG@10 of the test items of RANKED users after --epochs, and the seconds of the steps alone"""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = made_up(args.items, args.users)
    cfg = settings(table, codes=codes, num_epochs=args.epochs, filter_seen=True)
    run, taken, steps = costs.new_run(cfg, dataset), 0.0, 0
    for epoch in range(args.epochs):
        for batch in run.batches.epoch(epoch):
            begin = time.perf_counter()
            rate = learning_rate(steps, args.epochs * len(run.batches), cfg.train)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            costs.step(run, batch)
            steps += 1
            taken += time.perf_counter() - begin
    found = evaluate(run.model, first_users(dataset, RANKED), "test", cfg.eval)["NDCG@10"]
    return {"NDCG@10": f"{found:.4f}".removeprefix("0"), "seconds": f"{taken:.0f}"}


PARTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "ml-1m": ml_1m,
    "bytes": bytes_of_models,
    "ranking": ranking,
    "memory": memory,
    "quality": quality,
}


def read_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--runs", type=Path, default=Path("runs/pq"), help="folder of ml-1m's runs [runs/pq]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of ml-1m [3]")
    parser.add_argument("--codes", default="8,16", help="numbers of codes of ml-1m, from scratch [8,16]")
    parser.add_argument("--processes", type=int, default=2, help="of each of these runs [2]")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the made-up catalogue [1,000,000]")
    parser.add_argument("--users", type=int, default=40_000, help="who use it [40,000]")
    parser.add_argument("--epochs", type=int, default=2, help="of quality [2]")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to write [{RECORD.name}]")
    args, args.flags = parser.parse_known_args()
    args.parts, args.codes = args.parts.split(","), args.codes.split(",")
    if not set(args.parts) <= PARTS.keys():
        raise UserError(f"--parts must be of {', '.join(PARTS)}")
    return args


def main() -> None:
    args = read_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.parts:
        record[name] = stamp() | {"load": os.getloadavg()[0]} | PARTS[name](args)
        show(name, record[name])
        text = json.dumps(record, indent=1)
        write_whole(args.out, lambda path, text=text: path.write_text(text + "\n"))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
