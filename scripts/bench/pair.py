"""Time and memory of training, this checkout against another one, in turns on the same machine.

    git worktree add ../before COMMIT
    python scripts/bench/pair.py --before=../before --config=configs/ctr_time.yaml --num_epochs=1
    python scripts/bench/pair.py --before=../before --items=1000000 --loss=sampled_softmax --num_epochs=1

All flags but those of --help go to main.py, which runs in its own checkout: relative paths are taken from
there, but for the folder of the data ($RECLM_DATA, else data/), which is the same for both. Nothing but the
command line of main.py and its metrics.jsonl is used, so any two versions can be compared.

training, s     an epoch, without start-up and preparation; of several, the mean of all but the first
evaluation, s   the validation after it, likewise
memory, GiB     peak resident memory of all processes; pages that they share count in each of them

Medians over the rounds, with the range. Made-up data (--items): every item occurs, so that the table of items
has its full size, but only --users are trained on and ranked.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from measure import arguments, compare, launcher, peak_of, run, say, show, table, write, write_csv

from reclm.errors import UserError

HERE = Path(__file__).resolve().parents[2]


def read_args() -> tuple[argparse.Namespace, list[str]]:
    parser = arguments(__doc__, "pair.json")
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--processes", type=int, default=2, help="of torchrun, one thread each; 1: without it"
    )
    parser.add_argument("--items", type=int, help="train on made-up data with a catalogue of this size")
    parser.add_argument("--users", type=int, default=256, help="of the made-up data")
    args, flags = parser.parse_known_args()
    if not (args.before / "main.py").is_file():
        raise UserError(f"--before={args.before} has no main.py: name another checkout")
    if min(args.rounds, args.processes, args.users) < 1:
        raise UserError("--rounds, --processes and --users are at least 1")
    return args, flags


def write_made_up(path: Path, items: int, users: int) -> None:
    """Users with 20 to 200 actions, and for each item that they leave out someone who did nothing else: one
    action alone is neither trained on nor ranked."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 201, users)
    chosen = rng.integers(0, items, lengths.sum())
    left_out = np.setdiff1d(np.arange(items), chosen)
    owner = np.concatenate([np.repeat(np.arange(users), lengths), users + np.arange(len(left_out))])
    write_csv(path, owner, np.concatenate([chosen, left_out]), np.arange(len(owner)))


def train(checkout: Path, flags: list[str], processes: int, cache: Path) -> dict[str, float]:
    """One run of main.py in processes of its own."""
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
    said = {"flags": flags, "processes": args.processes, "items": args.items, "users": args.users}
    write(args.out, said | {"before": commit(args.before), "results": results, "rounds": rounds})


if __name__ == "__main__":
    run(main)
