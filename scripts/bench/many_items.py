"""Train, resume and evaluate with ten million items on two processes, from data on disk: seconds and memory.

    pip install -r requirements-dev.txt -r requirements-prepare.txt
    python scripts/bench/many_items.py --work=items                 # about 15 minutes, 8 GB of disk
    python scripts/bench/many_items.py --work=items --items=1e5 --out=small.json

The actions are made up: 2,000 users each of whom has another part of the items, in random order. Steps:

prepare         by scripts/prepare.py --engine=polars
first epoch     main.py --deal_items, sampled softmax with 8,192 negatives, row-wise Adagrad; every user is
                ranked against all items for validation and test
second epoch    the same, resumed from the checkpoint
evaluate        the checkpoint again, on two processes, and on one, which must find the same ranks

GiB are those of all processes of a step together, at their peak.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from measure import launcher, peak_of, show

from reclm.errors import UserError, run_script
from reclm.run.logger import say
from reclm.run.output import ScriptParser, write_whole
from reclm.run.report import stamp

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "configs" / "records" / "many_items.json"
USERS = 2_000
TRAIN = [
    "main.py", "--dim=64", "--max_len=50", "--batch_size=128", "--loss=sampled_softmax",
    "--num_negatives=8192", "--table_optimizer=rowwise_adagrad", "--exclude_history=false",
    "--filter_seen=true", "--lr_min=1", "--keep_last=1", "--device=cpu",
]  # fmt: skip


def write_actions(path: Path, items: int) -> None:
    rng = np.random.default_rng(0)
    item, user = rng.permutation(items), np.arange(items) % USERS
    table = pa.table({"user": user, "item": item, "timestamp": np.arange(items)})
    pyarrow.parquet.write_table(table, path)


def timed(command: list) -> dict[str, float]:
    """Seconds and peak GiB of a command."""
    begin = time.time()
    peak = peak_of(list(map(str, command)), ROOT, OMP_NUM_THREADS="1")
    return {"seconds": time.time() - begin, "GiB": peak}


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="new folder for the data and the run")
    parser.add_argument("--items", type=float, default=1e7, help="[1e7]")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"[{RECORD.name}]")
    args = parser.parse_args()
    items = int(args.items)
    if items < 10 * USERS:
        raise UserError(f"--items={items} must be at least {10 * USERS}")
    if args.work.exists():
        raise UserError(f"--work={args.work} exists: name a new folder")
    work = args.work.resolve()
    work.mkdir()
    write_actions(work / "actions.parquet", items)
    data, run = [f"--dataset={work / 'prepared'}"], work / "run"
    prepare = ["scripts/prepare.py", "--engine=polars", f"--input={work / 'actions.parquet'}"]
    rows = {"prepare": timed([*launcher(1), *prepare, f"--out={work / 'prepared'}"])}
    train = [*launcher(2), *TRAIN, *data, "--deal_items", f"--out_dir={run}"]
    rows["first epoch"] = timed([*train, "--num_epochs=1"])
    say(f"{rows}")
    rows["second epoch, resumed"] = timed([*train, "--num_epochs=2", "--resume=auto"])
    evaluate, found = ["main.py", "--eval_only", "--ckpt_name=last.pth", *data, f"--out_dir={run}"], []
    for name, command in {
        "evaluate, two processes": [*launcher(2), *evaluate, "--deal_items"],
        "evaluate, one process": [*launcher(1), *evaluate],
    }.items():
        rows[name] = timed(command)
        found.append(json.loads((run / "eval-last.json").read_text())["test"])
    if max(abs(found[0][name] - value) for name, value in found[1].items()) > 1e-6:
        raise AssertionError(f"other ranks: {found}")
    results = [{"step": name, **row} for name, row in rows.items()]
    show(f"{items:,} items", results)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {"items": items, "users": USERS, "seconds per step": steps[-1]["train_seconds"] / -(-USERS // 128)}
    text = json.dumps(stamp() | more | {"results": results}, indent=1) + "\n"
    write_whole(args.out, lambda path: path.write_text(text))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
