"""What a step takes in each layout of the weights: ms, memory, and bytes that a process sends.

    pip install -r requirements-dev.txt
    python scripts/bench/layouts.py
    python scripts/bench/layouts.py --parts=items --items=1e6,1e7

layouts  --parallel, --deal_items and --engine on MovieLens-1M's size with the settings of speedrun.yaml, on
         two processes, and on four for fsdp+tp
items    a dealt item table by its number of rows, beside one in every process: d = 64, sequences of 50
         actions, sampled softmax with 8,192 negatives, row-wise Adagrad, on two processes

Synthetic sequences, one thread per process. Each case is a launch of its own by torchrun; the rounds take all
cases in turn. ms is the median of a round's steps; MiB the peak of the largest process above that of the
program and the data; KiB sent those of the loopback device, divided by the processes. Linux only.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure  # before torch
import psutil
import torch
from costs import ML_1M, made_up, new_run, step
from measure import launcher, peak_of, show, summary

from reclm.config import build_config
from reclm.errors import UserError, run_script
from reclm.run import dist
from reclm.run.logger import say
from reclm.run.output import ScriptParser, write_whole
from reclm.run.process import keep_freed_memory
from reclm.run.report import stamp

RECORD = Path(__file__).resolve().parents[2] / "configs" / "records" / "bench_layouts.json"
STEPS, WARM_UP = 10, 3
SPEEDRUN = {"loss": "softmax", "position_embedding": True, "gated_residuals": True, "optimizer": "adamw"}
LAYOUTS = {  # name: (processes, flags)
    "one process": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"parallel": "fsdp"}),
    "tp": (2, {"parallel": "tp"}),
    "ddp, items dealt": (2, {"deal_items": True}),
    "tp, items dealt": (2, {"parallel": "tp", "deal_items": True}),
    "fsdp+tp": (4, {"parallel": "fsdp+tp"}),
    **{f"ZeRO-{stage}": (2, {"engine": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)},
}
LARGE = {
    "loss": "sampled_softmax", "num_negatives": 8192, "max_len": 50, "batch_size": 128, "optimizer": "adamw",
    "table_optimizer": "rowwise_adagrad",
}  # fmt: skip


def cases(part: str, items: list[float]) -> dict[str, tuple[int, dict, dict]]:
    """{name: (processes, flags, sizes of made_up)}"""
    if part == "layouts":
        sizes = ML_1M | {"users": 1024}
        return {name: (processes, SPEEDRUN | flags, sizes) for name, (processes, flags) in LAYOUTS.items()}
    found = {}
    for count in map(int, items):
        sizes = {"users": 20_000, "items": count, "length": 50}
        found[f"{count:,} items, dealt"] = (2, LARGE | {"deal_items": True}, sizes)
        if count <= 10**6:
            found[f"{count:,} items in each"] = (2, LARGE, sizes)
    return found


def run_case(processes: int, flags: dict, sizes: dict) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [*launcher(processes), __file__, f"--case={json.dumps([flags, sizes])}", f"--out={out}"]
        peak_of(command, Path(folder), OMP_NUM_THREADS="1")
        return json.loads(out.read_text())


def measure_case(flags: dict, sizes: dict) -> dict[str, float]:
    """In each process of a launch"""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = made_up(**sizes)
    before = psutil.Process().memory_info().rss / 2**20
    run = new_run(build_config(flags | {"exclude_history": False, "device": "cpu"}), dataset)
    batches, taken = cycle(islice(run.batches.epoch(0), 4)), []
    for _ in range(WARM_UP):
        step(run, next(batches))
    dist.barrier()
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    for _ in range(STEPS):
        begin = time.perf_counter()
        step(run, next(batches))
        dist.barrier()
        taken.append(time.perf_counter() - begin)
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent
    peaks = dist.gather_from_processes(measure.own_peak() - before)
    return {
        "ms": 1e3 * statistics.median(taken),
        "MiB": max(peaks),
        "KiB": sent / STEPS / dist.num_processes() / 1024,
    }


def rows_of(part: str, args: argparse.Namespace) -> list[dict]:
    chosen = cases(part, args.items)
    rounds = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name, case in chosen.items():
            rounds[name].append(run_case(*case))
            say(f"{name}: {rounds[name][-1]}")
    return [
        {
            "layout" if part == "layouts" else "item table": name,
            "processes": chosen[name][0],
            "ms per step": summary([row["ms"] for row in rows])["median"],
            "peak MiB of a process": summary([row["MiB"] for row in rows])["median"],
            "KiB sent by a process": summary([row["KiB"] for row in rows])["median"],
        }
        for name, rows in rounds.items()
    ]


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--parts", default="layouts,items", help="[both]")
    parser.add_argument("--items", default="1e6,1e7,5e7", help="rows of the tables [1e6,1e7,5e7]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to add to [{RECORD.name}]")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the launches that this script makes
    args = parser.parse_args()
    if args.case:
        with dist.distributed():
            found = measure_case(*json.loads(args.case))
            dist.on_main(lambda: args.out.write_text(json.dumps(found)))
        return
    parts = args.parts.split(",")
    try:
        args.items = [float(count) for count in args.items.split(",")]
    except ValueError:
        raise UserError(f"--items={args.items} must be numbers, separated by commas") from None
    if not set(parts) <= {"layouts", "items"} or args.rounds < 1 or min(args.items) < 100:
        raise UserError("--parts must be of layouts, items; --rounds at least 1; --items at least 100")
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in parts:
        rows = rows_of(part, args)
        show(part, rows)
        record[part] = stamp() | {"results": rows}
        text = json.dumps(record, indent=1) + "\n"
        write_whole(args.out, lambda path, text=text: path.write_text(text))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
