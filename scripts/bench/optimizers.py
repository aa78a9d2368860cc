"""Compare the optimizers: costs of a step at two sizes of the catalogue, and NDCG@10 after full trainings.

    pip install -r requirements-dev.txt -r requirements-adapt.txt
    python scripts/bench/optimizers.py --parts=small,large
    python scripts/bench/optimizers.py --parts=rates,quality --runs=runs/optimizers --data_dir=data

small    bytes of state per weight, peak MiB of training, ms per step: settings of configs/speedrun.yaml on
         synthetic sequences of about MovieLens-1M's size
large    the same with a million items, the default loss and T = 50
rates    best validation NDCG@10 of configs/speedrun.yaml cut to three epochs, by learning rate, seed 0
quality  test NDCG@10 of configs/speedrun.yaml at the best rate in the record, over --seeds

Steps are measured in a new process of one thread per optimizer and round, so that the peak is its own; rounds
alternate between the optimizers. ms is the mean of 20 steps, since not all cost the same. MiB is the peak of
resident memory, less that before the model was built: weights, gradients, state and activations. Trainings
take one process and one thread each, about 8 minutes a seed. What is measured is added to the record --out;
rates that it has and trainings that --runs holds are not repeated. Linux only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import gc
import json
import statistics
import time
from functools import partial
from itertools import cycle, islice

import measure  # before torch
import psutil
import torch
from costs import ML_1M, alone, made_up, new_run, step
from measure import summary
from results import as_table, spread
from trainings import ROOT, as_flags, curve, test_metrics, trained

from reclm.config import build_config
from reclm.errors import UserError, run_script
from reclm.run.logger import say
from reclm.run.output import ScriptParser, write_whole
from reclm.run.process import keep_freed_memory
from reclm.run.report import stamp

RECORD = ROOT / "configs" / "records" / "bench_optimizers.json"
VARIANTS = {  # name: flags, the flag of the learning rate that is chosen, and its candidates
    "adamw": ({"optimizer": "adamw"}, "lr", (6e-3, 1e-2, 2e-2)),
    "adamw8bit": ({"optimizer": "adamw8bit"}, "lr", (6e-3, 1e-2, 2e-2)),
    "adafactor": ({"optimizer": "adafactor"}, "lr", (6e-2, 2e-1, 6e-1)),
    "rowwise_adagrad": (
        {"optimizer": "adamw", "table_optimizer": "rowwise_adagrad", "lr": 1e-2},
        "table_lr",
        (6e-2, 0.2, 0.6),
    ),
    "muon": ({"optimizer": "muon"}, "lr", (1e-2, 2e-2, 4e-2)),
    "muon, rowwise_adagrad": (
        {"optimizer": "muon", "table_optimizer": "rowwise_adagrad", "lr": 2e-2},
        "table_lr",
        (6e-2, 0.2, 0.6),
    ),
    "sophia": ({"optimizer": "sophia"}, "lr", (3e-4, 1e-3, 3e-3)),
    "lomo": ({"optimizer": "lomo"}, "lr", (0.3, 1.0, 3.0)),
    "adalomo": ({"optimizer": "adalomo"}, "lr", (6e-2, 2e-1, 6e-1)),
}
UNCLIPPED = {"lomo, no clipping": ({"optimizer": "lomo", "clip_norm": 0.0}, "lr", (0.3,))}
SPEEDRUN = {"loss": "softmax", "position_embedding": True, "gated_residuals": True}
SIZES = {  # part: (settings, items, users, length)
    "small": (SPEEDRUN, 3_416, 1024, ML_1M["length"]),
    "large": ({"max_len": 50}, 1_000_000, 20_000, 50),
}
SHORT = 3  # epochs of `rates`
GOAL = 0.17  # NDCG@10 on validation
STEPS = 20


# ---------------------------------------------------------------- steps


def costs(part: str, args: argparse.Namespace, record: dict) -> dict[str, dict]:
    """{optimizer: {"bytes", "MiB", "ms": `summary`}}"""
    settings, *data = SIZES[part]
    rounds = {name: [] for name in args.only}
    if part == "small":
        rounds |= {name: [] for name in UNCLIPPED}
    else:
        rounds.pop("sophia", None)  # it needs the softmax over all items
    for _ in range(args.rounds):
        for name, rows in rounds.items():
            flags = (VARIANTS | UNCLIPPED)[name][0]
            rows.append(alone(cost, settings | flags, *data))
    return known(record, part) | {
        name: {column: summary([row[column] for row in rows]) for column in rows[0]}
        for name, rows in rounds.items()
    }


def known(record: dict, part: str) -> dict:
    """{optimizer: what a record has of it}"""
    return record.get(part, {}).get("results", {})


def costs_row(name: str, costs: dict) -> dict:
    bytes_, mib, ms = (costs[column]["median"] for column in ("bytes", "MiB", "ms"))
    return {"optimizer": name, "bytes of state per weight": bytes_, "peak MiB": mib, "ms per step": ms}


def cost(flags: dict, items: int, users: int, length: int) -> dict[str, float]:
    """{"bytes": of state per weight, "MiB", "ms"} of training with these flags, on synthetic sequences."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = made_up(users, items, length)
    cfg = build_config(flags | {"exclude_history": False, "device": "cpu"})
    gc.collect()
    before = psutil.Process().memory_info().rss / 2**20
    run = new_run(cfg, dataset)
    batches = cycle(islice(run.batches.epoch(0), 4))
    for _ in range(2):
        step(run, next(batches))
    begin = time.perf_counter()
    for _ in range(STEPS):
        step(run, next(batches))
    taken = (time.perf_counter() - begin) / STEPS
    state = run.optimizer.state_dict()["state"].values()
    held = sum(x.numel() * x.element_size() for values in state for x in values.values() if x is not None)
    weights = sum(weight.numel() for weight in run.model.parameters())
    return {"bytes": held / weights, "MiB": measure.own_peak() - before, "ms": 1e3 * taken}


# ---------------------------------------------------------------- trainings


def train(args: argparse.Namespace, name: str, rate: float, seed: int, **more) -> Path:
    """The folder of a finished training."""
    flags, which, _ = VARIANTS[name]
    folder = args.runs / "-".join(
        [name.replace(", ", "+"), f"{rate:g}", f"seed{seed}", *(f"{k}={v}" for k, v in more.items())]
    )
    given = {"config": "configs/speedrun.yaml", **flags, which: rate, "seed": seed, **more}
    return trained(folder, as_flags(given | {"data_dir": args.data_dir}))


def rates(args: argparse.Namespace, record: dict) -> dict:
    """{optimizer: {learning rate: best validation NDCG@10 of a short training}}"""
    found = dict(known(record, "rates"))
    for name in args.only:
        found[name] = dict(found.get(name, {}))
        for rate in VARIANTS[name][2]:
            if f"{rate:g}" in found[name]:
                continue
            folder = train(args, name, rate, 0, num_epochs=SHORT)
            found[name][f"{rate:g}"] = max(score for _, score in curve(folder))
            say(f"{name}, rate {rate:g}: {found[name][f'{rate:g}']:.4f}")
    return found


def rates_row(name: str, by_rate: dict) -> dict:
    scores = ", ".join(f"{rate}: {spread([score])}" for rate, score in by_rate.items())
    return {"optimizer": name, f"`--{VARIANTS[name][1]}`: validation NDCG@10": scores}


def quality(args: argparse.Namespace, record: dict) -> dict:
    """{optimizer: {rate: {seed: {"NDCG@10", "HR@10", "epochs"}}}} at the best rate of `rates`; epochs are
    those to GOAL on validation, None if it is not reached."""
    found, tried = dict(known(record, "quality")), known(record, "rates")
    for name in args.only:
        if name not in tried:
            raise UserError(f"the record has no rates of {name}: use --parts=rates,quality")
        best = max(tried[name], key=tried[name].get)
        found[name] = {best: dict(found.get(name, {}).get(best, {}))}  # none of another rate
        for seed in args.seeds:
            folder = train(args, name, float(best), seed)
            test = test_metrics(folder)
            reached = [epoch for epoch, (_, score) in enumerate(curve(folder), 1) if score >= GOAL]
            found[name][best][str(seed)] = {m: test[m] for m in ("NDCG@10", "HR@10")} | {
                "epochs": reached[0] if reached else None
            }
            say(f"{name}, rate {best}, seed {seed}: test NDCG@10 {test['NDCG@10']:.4f}")
    return found


def quality_row(name: str, found: dict) -> dict:
    [(rate, seeds)] = found.items()
    tests = list(seeds.values())
    epochs = [test["epochs"] for test in tests]
    return {
        "optimizer": name,
        "rate": rate,
        **{f"test {m}": spread([test[m] for test in tests]) for m in ("NDCG@10", "HR@10")},
        "seeds": len(tests),
        f"epochs to {GOAL} on validation": "not reached"
        if None in epochs
        else f"{statistics.mean(epochs):.1f}",
    }


PARTS = {  # name: what measures it, and a row of its table
    "small": (partial(costs, "small"), costs_row),
    "large": (partial(costs, "large"), costs_row),
    "rates": (rates, rates_row),
    "quality": (quality, quality_row),
}


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument(
        "--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="optimizers [all]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of small and large [3]")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of quality [0 1 2]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "optimizers", help="folder of trainings")
    parser.add_argument("--data_dir", help="as for main.py")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to add to [{RECORD.name}]")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS) or args.rounds < 1:
        raise UserError(f"--parts must be of {', '.join(PARTS)}, and --rounds at least 1")
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in parts:
        measure_part, row = PARTS[part]
        results = measure_part(args, record)
        rows = [row(name, results[name]) for name in VARIANTS | UNCLIPPED if name in results]
        say(f"{part}\n\n{as_table(rows)}\n")
        record[part] = stamp() | {"results": results, "table": rows}
        text = json.dumps(record, indent=1) + "\n"
        write_whole(args.out, lambda path, text=text: path.write_text(text))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
