"""Train the same short runs in two checkouts and compare their weights and metrics.

    git worktree add ../before COMMIT
    python scripts/compare.py --repo=../before --out=before.json      # before the change
    python scripts/compare.py --out=after.json --against=before.json  # after it

Prints a table. The exit code is 1 if a metric differs by more than 5e-5, that is, in its fourth digit.
Weights are compared by a hash that does not depend on the names of the parameters. Every run launches main.py
with torchrun, with one thread per process, on MovieLens-100K or with the config of the same name."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.errors import run_script
from reclm.run.output import ScriptParser

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--dataset=ml-100k"]
RUNS = {  # name: (processes, flags)
    "default, 1 process": (1, [*SMALL, "--num_epochs=2"]),
    "default, 2 processes": (2, [*SMALL, "--num_epochs=2"]),
    "gbce": (2, [*SMALL, "--num_epochs=1", "--loss=gbce"]),
    "sampled softmax": (2, [*SMALL, "--num_epochs=1", "--loss=sampled_softmax"]),
    "softmax": (2, [*SMALL, "--num_epochs=1", "--loss=softmax"]),
    "negatives per position": (
        2, [*SMALL, "--num_epochs=1", "--share_negatives=false", "--num_negatives=4"]
    ),
    "history not excluded": (2, [*SMALL, "--num_epochs=1", "--loss=softmax", "--exclude_history=false"]),
    "time head": (2, [*SMALL, "--num_epochs=1", "--time_head=true"]),
    "cold items": (2, [*SMALL, "--num_epochs=1", "--cold_items=.1", "--item_features=genres,year,title"]),
    "window, GQA": (
        2, [*SMALL, "--num_epochs=1", "--window=20", "--n_heads=4", "--n_kv_heads=2"]
    ),
    "rows with all tokens": (
        2, [*SMALL, "--num_epochs=1", "--time_tokens=tokens", "--profile_tokens=true", "--request_time=true",
            "--action_embedding=true", "--negative_below=2", "--position_embedding=true", "--max_len=50"]
    ),
    "CTR by HSTU": (
        2, [*SMALL, "--num_epochs=1", "--task=ctr", "--model_name=hstu", "--user_embedding=explicit",
            "--time_tokens=embedding", "--ctr_split=random", "--max_len=50"]
    ),
    "p3_best": (2, ["--config=configs/p3_best.yaml", "--num_epochs=1"]),
    "p2_best": (2, ["--config=configs/p2_best.yaml", "--num_epochs=1"]),
    "p2_hstu": (2, ["--config=configs/p2_hstu.yaml", "--num_epochs=1"]),
    "ctr_time": (2, ["--config=configs/ctr_time.yaml", "--num_epochs=1"]),
}  # fmt: skip
SHOWN = ("NDCG@10", "AUC")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--repo", default=ROOT, type=Path, help="checkout to run [default: this one]")
    parser.add_argument(
        "--out", required=True, type=Path, help="JSON file for results; runs in it are skipped"
    )
    parser.add_argument("--against", type=Path, help="--out file of the other checkout, to compare with")
    parser.add_argument(
        "--only", nargs="*", choices=RUNS, default=list(RUNS), help="runs to train [default: all]"
    )
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        if name not in results:
            results[name] = run(args.repo, *RUNS[name])
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {results[name]}", flush=True)
    if args.against:
        sys.exit(compare(json.loads(args.against.read_text()), results, args.only))


def run(repo: Path, processes: int, flags: list[str]) -> dict:
    """Train in the checkout `repo` -> {"weights": hash, "valid": metrics, "test": metrics, "seconds"}. Exits
    if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "main.py", *flags, f"--out_dir={folder}"]
        done = subprocess.run(
            command, cwd=repo, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        result = json.loads(Path(folder, "result.json").read_text())
        state = torch.load(Path(folder, "last.pth"), weights_only=True)
        hashes = sorted(hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in state["model"].values())
    return {
        "weights": hashlib.sha256("".join(hashes).encode()).hexdigest()[:12],
        "valid": result["valid"],
        "test": result["test"],
        "seconds": result["seconds"],
    }


def compare(before: dict, after: dict, names: list[str]) -> int:
    """Print a table of the runs. Returns 1 if a metric differs by more than 5e-5, else 0."""
    print("| run | weights | valid before | valid after | test before | test after | largest difference |")
    print("|---|---|---|---|---|---|---|")
    changed = 0
    for name in names:
        old, new = before[name], after[name]
        bits = "identical" if old["weights"] == new["weights"] else "differ"
        row, largest = [], 0.0
        for split in ("valid", "test"):
            shown = next(metric for metric in SHOWN if metric in old[split])
            row += [f"{result[split][shown]:.4f}" for result in (old, new)]
            differences = [abs(old[split][m] - new[split][m]) for m in old[split].keys() & new[split].keys()]
            largest = max(largest, *differences)
        changed |= largest > 5e-5
        print(f"| {name} | {bits} | {' | '.join(row)} | {largest:.1e} |")
    return int(changed)


if __name__ == "__main__":
    run_script(main)
