"""Compare time and memory of training in this checkout and another one, alternating on the same machine.

    git worktree add ../before COMMIT
    python scripts/bench/pair.py --before=../before --config=configs/ctr_time.yaml --num_epochs=1
    python scripts/bench/pair.py --before=../before --items=1000000 --loss=sampled_softmax --num_epochs=1

training, s     seconds per epoch, without start-up and preparation; of several, the mean of all but the first
evaluation, s   seconds per validation, likewise
memory, GiB     peak resident memory of all processes; shared pages count in each process

The table shows medians over the rounds, with the range. With --items the data are synthetic: every item
occurs, so that the item table has its full size, but only --users users are trained on and ranked.

All flags not listed below go to main.py, which runs in its own checkout: relative paths are resolved there,
except the data folder ($RECLM_DATA, else data/), which both share. Only the command line of main.py and its
metrics.jsonl are used, so any two versions with these can be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from measure import arguments, compare, launcher, peak_of, say, show, table, write, write_csv

from reclm.errors import UserError, run_script

HERE = Path(__file__).resolve().parents[2]


def read_args() -> tuple[argparse.Namespace, list[str]]:
    parser = arguments(__doc__, "pair.json")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, with a main.py")
    parser.add_argument("--rounds", type=int, default=3, help="runs per checkout [default: %(default)s]")
    parser.add_argument(
        "--processes", type=int, default=2, help="of torchrun, one thread each; 1 = no torchrun"
    )
    parser.add_argument("--items", type=int, help="train on synthetic data with this many items")
    parser.add_argument("--users", type=int, default=256, help="users in the synthetic data [default: 256]")
    args, flags = parser.parse_known_args()
    if not (args.before / "main.py").is_file():
        raise UserError(f"--before={args.before} has no main.py: name a checkout")
    if min(args.rounds, args.processes, args.users) < 1:
        raise UserError("--rounds, --processes and --users must be at least 1")
    return args, flags


def write_made_up(path: Path, items: int, users: int) -> None:
    """Write a CSV of users with 20 to 200 actions each, plus one single-action user per item that none of
    them chose: a single action is neither trained on nor ranked."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 201, users)
    chosen = rng.integers(0, items, lengths.sum())
    left_out = np.setdiff1d(np.arange(items), chosen)
    owner = np.concatenate([np.repeat(np.arange(users), lengths), users + np.arange(len(left_out))])
    write_csv(path, owner, np.concatenate([chosen, left_out]), np.arange(len(owner)))


def train(checkout: Path, flags: list[str], processes: int, cache: Path) -> dict[str, float]:
    """Run main.py once in its own processes -> {column of the table: value}. Raises UserError if it fails."""
    env = {"OMP_NUM_THREADS": "1", "RECLM_CACHE": str(cache)}
    env["RECLM_DATA"] = str(Path(os.environ.get("RECLM_DATA", "data")).resolve())
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher(processes), "main.py", *flags, f"--out_dir={folder}"]
        memory = peak_of(command, checkout, **env)
        rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    rows = rows[1:] or rows  # the first epoch warms up
    return {
        "training, s": statistics.mean(row["train_seconds"] for row in rows),
        "evaluation, s": statistics.mean(row["eval_seconds"] for row in rows),
        "memory, GiB": memory,
    }


def commit(checkout: Path) -> str:
    """The commit of a checkout, 12 digits or more, with "-dirty" if it has changes; "unknown" without git."""
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    args, flags = read_args()
    checkouts, rounds = {"after": HERE, "before": args.before.resolve()}, {"after": [], "before": []}
    with tempfile.TemporaryDirectory() as folder:
        work, data = Path(folder), []
        if args.items:
            write_made_up(work / "made-up.csv", args.items, args.users)
            data = [f"--dataset={work / 'made-up.csv'}"]
        for i in range(args.rounds):
            for name, checkout in checkouts.items():
                rounds[name].append(train(checkout, [*flags, *data], args.processes, work / name))
                show(f"round {i}, {name}", rounds[name][-1])
    results = compare(rounds)
    say(table({"": name} | row for name, row in results.items()))
    given = {"flags": flags, "processes": args.processes, "items": args.items, "users": args.users}
    write(args.out, given | {"before": commit(args.before), "results": results, "rounds": rounds})


if __name__ == "__main__":
    run_script(main)
