"""Measure what quantization costs and saves: bytes, NDCG@10, ms per request and users/s of each format.

    pip install -r requirements-dev.txt
    python scripts/bench/shrink.py runs/p3-0/best.pth runs/p3-1/best.pth runs/p3-2/best.pth \\
        --qat_int4=runs/p3-qat-0/best.pth,runs/p3-qat-1/best.pth,runs/p3-qat-2/best.pth
    python scripts/bench/shrink.py runs/p3-0/best.pth --rounds=1 --out=new.json

Checkpoints are the seeds of one recipe; those of --qat_int8 and --qat_int4 the same seeds, trained for it.
Quality is of all seeds, by evaluate.py over all items; "kept" is NDCG@10 over that of the float32 models,
with its standard error, paired by user. Times are of the first seed, on one thread, all formats in turn: the
fastest of the rounds, and the median over persons. A request recommends ten items to a user of the data.
Bytes on disk are those of model.onnx as scripts/export.py writes it, bytes in memory those of the weights.

Beside them: a made-up table of a million items, of which one request scores all and chooses ten.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
sys.path.insert(0, str(Path(__file__).parent))

import measure
import numpy as np
import torch

from evaluate import evaluate, rank_users
from main import open_checkpoint
from reclm.adapt.quantize import BITS, QuantizedTable, num_bytes
from reclm.errors import UserError, run_script
from reclm.run.logger import say
from reclm.serve import Recommender
from reclm.serve.small_tables import SmallTable
from reclm.serve.top_k import score_items, top_k

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "configs" / "records" / "shrink.json"
PERSONS = 200  # of a round of requests
MANY_ITEMS, DIM = 1_000_000, 64
REPEATS = 10  # requests among many items, per round


def formats(args: argparse.Namespace) -> dict[str, tuple[list[Path], str]]:
    """{name of a row: (its checkpoints, its --quantize)}"""
    found = {"float32": (args.checkpoints, "none")}
    found |= {kind: (args.checkpoints, kind) for kind in BITS}
    qat = {kind: getattr(args, f"qat_{kind}") for kind in BITS}
    return found | {f"{kind}, trained for it": (paths, kind) for kind, paths in qat.items() if paths}


def quality(checkpoints: list[Path], kind: str, given: dict) -> dict[str, list]:
    """Of each checkpoint: NDCG@10 and HR@10 of each user, (U,), and the bytes of its weights and item table.
    Raises UserError for one of --task=ctr."""
    found = {"NDCG@10": [], "HR@10": [], "bytes in memory": [], "bytes of the item table": []}
    for path in checkpoints:
        cfg, dataset, model = open_checkpoint(given | {"eval_only": True, "quantize": kind}, path)
        if cfg.model.task != "matching":
            raise UserError(f"{path} is of --task={cfg.model.task}: use one of --task=matching")
        _, ranks, _ = rank_users(model, dataset, "test", cfg.eval)
        hits = (ranks <= 10).double()
        found["HR@10"].append(hits.numpy())
        found["NDCG@10"].append((hits / torch.log2(1 + ranks)).numpy())
        found["bytes in memory"].append(num_bytes(model))
        found["bytes of the item table"].append(num_bytes(model.item_embedding))
        say(f"{path}, {kind}: NDCG@10 {found['NDCG@10'][-1].mean():.4f}")
    return found


def share_kept(ours: list[np.ndarray], base: list[np.ndarray]) -> dict[str, float]:
    """The mean of `ours` over that of `base`, both (U,) per seed, and its standard error, paired by user"""
    ours, base = np.mean(ours, axis=0), np.mean(base, axis=0)
    kept = ours.mean() / base.mean()
    return {"mean": kept, "se": float((ours - kept * base).std(ddof=1) / len(base) ** 0.5 / base.mean())}


def exported_bytes(checkpoint: Path, kind: str) -> int:
    """Bytes of model.onnx"""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        script = ROOT / "scripts" / "export.py"
        command = [sys.executable, script, f"--ckpt_name={checkpoint}", f"--out={out}", f"--quantize={kind}"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise UserError(f"scripts/export.py failed: {ran.stderr.strip()[-500:]}")
        return (out / "model.onnx").stat().st_size


def speed(rows: dict[str, tuple[list[Path], str]], given: dict, rounds: int) -> dict[str, dict]:
    """{name: ms per request, the median over persons, and users/s of ranking all}, of the first checkpoint of
    each. Of each person, and of the ranking, the fastest round counts: other jobs can only add time."""
    recommenders, rankings = {}, {}
    for name, (paths, kind) in rows.items():
        cfg, dataset, model = open_checkpoint(given | {"eval_only": True, "quantize": kind}, paths[0])
        rankings[name] = partial(evaluate, model, dataset, "test", cfg.eval)
        recommenders[name] = Recommender.load(paths[0], quantize=kind)
    known = recommenders["float32"]
    chosen = np.random.default_rng(0).permutation(len(known.histories.users))[:PERSONS].tolist()
    people = [known.user_at(user) for user in chosen]
    requests = {name: np.full(len(people), np.inf) for name in rows}
    whole = dict.fromkeys(rows, np.inf)
    for _ in range(rounds + 1):  # one more to warm up
        for place, person in enumerate(people):  # in turn, so that all meet the same state of the machine
            for name in rows:
                taken = milliseconds(partial(recommenders[name].recommend, person, 10))
                requests[name][place] = min(taken, requests[name][place])
        for name in rows:
            whole[name] = min(milliseconds(rankings[name]), whole[name])
    users = len(dataset.ranked_users)
    return {
        name: {"ms per request": float(np.median(requests[name])), "users/s": 1e3 * users / whole[name]}
        for name in rows
    }


def milliseconds(work) -> float:
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def many_items(rounds: int) -> dict[str, dict]:
    """Of a table of MANY_ITEMS random rows: bytes, seconds to quantize it, ms of a request"""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((MANY_ITEMS + 1, DIM), dtype=np.float32) / np.float32(DIM**0.5)
    hidden, tables = rng.standard_normal((1, DIM), dtype=np.float32), {"float32": rows}
    found = {"float32": {"bytes": rows.nbytes, "seconds to quantize": 0.0}}
    for kind, bits in BITS.items():
        begin = time.perf_counter()
        table = QuantizedTable(torch.from_numpy(rows), bits)
        found[kind] = {"bytes": num_bytes(table), "seconds to quantize": time.perf_counter() - begin}
        tables[kind] = SmallTable(table)
    taken = {kind: [] for kind in tables}
    for _ in range(rounds * REPEATS + 1):
        for kind, table in tables.items():
            taken[kind].append(milliseconds(lambda table=table: top_k(score_items(hidden, table), 10)))
    return {kind: row | {"ms per request": min(taken[kind])} for kind, row in found.items()}


def read_args() -> argparse.Namespace:
    def paths(text: str) -> list[Path]:
        return [Path(part) for part in text.split(",")]

    parser = measure.arguments(__doc__, str(RECORD))
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of main.py, --task=matching, one per seed")
    for kind in BITS:
        parser.add_argument(f"--qat_{kind}", type=paths, help=f"as many, trained with --qat={kind}")
    parser.add_argument("--data_dir", help="folder of the data, as for main.py")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds [default: %(default)s]")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    for kind in BITS:
        given = getattr(args, f"qat_{kind}")
        if given and len(given) != len(args.checkpoints):
            raise UserError(f"--qat_{kind} names {len(given)} checkpoints, there are {len(args.checkpoints)}")
    for path in [*args.checkpoints, *(args.qat_int8 or []), *(args.qat_int4 or [])]:
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}")
    return args


def spread(users: list[np.ndarray]) -> dict[str, float]:
    """Over the seeds, of means over users"""
    means = [values.mean() for values in users]
    return {"mean": statistics.mean(means), "std": statistics.stdev(means) if len(means) > 1 else 0.0}


def text(part: dict[str, float]) -> str:
    """A `spread` as a cell, ".1802 ± .0009" """
    values = [part["mean"], *([part["std"]] if part["std"] else [])]
    return " ± ".join(f"{value:.4f}".removeprefix("0") for value in values)


def as_row(name: str, row: dict, base: dict) -> dict[str, str]:
    """A row of the table in docs/shrink.md"""
    sizes = ("bytes of the item table", "bytes in memory", "bytes on disk")
    cells = {size: f"{row[size]:,} ({base[size] / row[size]:.1f}x)" for size in sizes}
    cells |= {key: text(row[key]) for key in ("NDCG@10", "HR@10")}
    cells |= {"of NDCG@10 kept": "{mean:.1%} ± {se:.1%}".format(**row["kept"]) if row["kept"]["se"] else ""}
    cells |= {"ms per request": f"{row['ms per request']:.2f}"}
    return {"": name} | cells | {"users/s ranked": f"{row['users/s']:,.0f}"}


def main() -> None:
    args = read_args()
    torch.set_num_threads(1)
    given = {"data_dir": args.data_dir} if args.data_dir else {}
    rows = formats(args)
    measured = {name: quality(paths, kind, given) for name, (paths, kind) in rows.items()}
    base = measured["float32"]["NDCG@10"]
    times, found = speed(rows, given, args.rounds), {}
    for name, (paths, kind) in rows.items():
        values = measured[name]
        found[name] = {key: spread(values[key]) for key in ("NDCG@10", "HR@10")}
        found[name]["kept"] = share_kept(values["NDCG@10"], base)
        found[name] |= {key: values[key][0] for key in ("bytes in memory", "bytes of the item table")}
        found[name]["bytes on disk"] = exported_bytes(paths[0], kind)
        found[name] |= times[name]
    about = Recommender.load(args.checkpoints[0]).about
    result = {
        "model": f"{about.dataset}, {about.protocol}",
        "seeds": len(args.checkpoints),
        "rounds": args.rounds,
        "formats": found,
        "per seed": {name: [seed.mean() for seed in row["NDCG@10"]] for name, row in measured.items()},
        "table": [as_row(name, row, found["float32"]) for name, row in found.items()],
        "million items": many_items(args.rounds),
    }
    measure.show("formats", result["table"])
    measure.write(args.out, result)


if __name__ == "__main__":
    run_script(main)
