"""Speed beside other tools: the same interactions, sizes, loss, batch and number of threads, in one run.

    python scripts/bench.py --peers=recbole,rectools --data_dir=data --out=bench.json

Every tool reads the same interactions, trains SASRec-sized blocks (d = 64, 2 blocks, 2 heads, length 200,
batch 128, full softmax) and ranks all items for all users. Peers run in virtual environments of their own,
made here on first use. Rounds alternate between the tools; medians are reported, with the range.

Tokens are real positions that go through the blocks (no padding). RecBole trains on one target a row, the
others on one a token, so targets are counted too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the spine

from data import load_dataset  # noqa: E402
from reclm.config import DataConfig  # noqa: E402
from reclm.errors import UserError  # noqa: E402

PACKAGES = {
    "recbole": [
        "recbole==1.2.1",
        "torch==2.13.0",
        "setuptools<80",
        "numpy==1.26.4",
        "pandas<2.3",
        "scipy<1.12",
    ],
    "rectools": ["rectools[torch]==0.19.0", "torch==2.13.0"],
}
SPEC = {
    "dim": 64, "n_layers": 2, "n_heads": 2, "max_len": 200, "dropout": 0.2, "batch_size": 128, "lr": 1e-3,
    "eval_batch_size": 256, "threads": 2,
}  # fmt: skip
RATES = {
    "train_tokens_per_s": ("tokens", "train_seconds"),
    "train_targets_per_s": ("targets", "train_seconds"),
    "eval_users_per_s": ("eval_users", "eval_seconds"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", default="recbole,rectools", help="comma-separated: recbole, rectools")
    parser.add_argument("--data_dir", help="as for main.py")
    parser.add_argument("--dataset", help="as for main.py")
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="timed steps of a peer; ours runs whole epochs")
    parser.add_argument("--time_to", type=float, default=0.0, help="also: seconds to this validation NDCG@10")
    parser.add_argument("--time_limit", type=float, default=480.0, help="seconds a tool may take for that")
    parser.add_argument("--venvs", default=str(Path.home() / ".cache" / "reclm" / "bench"))
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    unknown = [name for name in args.peers if name not in PACKAGES]
    if unknown or args.rounds < 1 or args.steps < 1:
        raise UserError(f"--peers knows {', '.join(PACKAGES)}; --rounds and --steps are at least 1")
    return args


def make_venv(folder: Path, packages: list[str]) -> Path:
    """The Python of a peer's environment, which is made where it is missing."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        print(f"installing {packages[0]} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        done.touch()
    return python


def write_interactions(args: argparse.Namespace, work: Path) -> dict:
    """The same rows as CSV and as RecBole's .inter; a timestamp is the place in the user's sequence."""
    dataset = load_dataset(DataConfig(dataset=args.dataset, data_dir=args.data_dir))
    users = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    times = np.arange(len(users)) - np.repeat(dataset.offsets[:-1], dataset.lengths)
    rows = np.stack([users, dataset.item_ids, times], axis=1)
    csv, inter = work / "interactions.csv", work / "bench" / "bench.inter"
    inter.parent.mkdir()
    np.savetxt(csv, rows, "%d", ",", header="user,item,timestamp", comments="")
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(inter, rows, "%d", "\t", header=header, comments="")
    print(
        f"data: {dataset.name}, {dataset.num_users:,} users, {dataset.num_items:,} items, {len(rows):,} rows"
    )
    return {"csv": str(csv), "inter": str(inter)}


def command(tool: str, pythons: dict) -> tuple[list, int]:
    """(how a tool is started, OMP threads of each of its processes): the total is the same for all."""
    script = HERE / "bench" / f"run_{tool}.py"
    if tool != "ours":
        return [pythons[tool], script], SPEC["threads"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={SPEC['threads']}", script], 1


def measure(tool: str, pythons: dict, spec: dict, work: Path) -> dict:
    result, file = work / "result.json", work / "spec.json"
    result.unlink(missing_ok=True)
    file.write_text(json.dumps(SPEC | spec | {"result": str(result)}))
    start, threads = command(tool, pythons)
    # A passive wait policy helps every tool on a shared machine; ours sets it by itself.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    env["RECLM_CACHE"] = str(work / "cache")
    ran = subprocess.run([*start, file], cwd=work, env=env, capture_output=True, text=True)
    if not result.is_file():
        raise UserError(f"{tool} did not finish (exit {ran.returncode}): {ran.stderr.strip()[-500:]}")
    return json.loads(result.read_text())


def summarise(rows: list[dict]) -> dict:
    """Median and range of every rate, and of the preparation time (the first round, which is cold, apart)."""
    values = {name: [row[a] / row[b] for row in rows] for name, (a, b) in RATES.items()}
    values["prepare_seconds"] = [row["prepare_seconds"] for row in rows[1:] or rows]
    return {k: {"median": statistics.median(v), "min": min(v), "max": max(v)} for k, v in values.items()}


def report(results: dict) -> dict:
    """Print the table; returns the ratios ours / theirs of the medians."""
    print(f"\n{'':12}{'tokens/s':>28}{'targets/s':>28}{'users/s ranked':>28}{'warm preparation, s':>28}")
    for tool, summary in results.items():
        cells = [f"{v['median']:,.5g} [{v['min']:,.5g}, {v['max']:,.5g}]" for v in summary.values()]
        print(f"{tool:12}" + "".join(f"{cell:>28}" for cell in cells))
    ratios = {}
    for peer in (tool for tool in results if tool != "ours"):
        for name, ours in results["ours"].items():
            ratios[f"{name}.{peer}"] = ours["median"] / results[peer][name]["median"]
    for name, ratio in ratios.items():
        print(f"{name:32} ours / theirs = {ratio:.3g}")
    return ratios


def main() -> None:
    args = parse_args()
    pythons = {name: make_venv(Path(args.venvs) / name, PACKAGES[name]) for name in args.peers}
    tools = ["ours", *args.peers]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        spec = write_interactions(args, work) | {"steps": args.steps, "time_to": 0.0}
        rounds = {tool: [] for tool in tools}
        for i in range(args.rounds):
            for tool in tools:
                rounds[tool].append(measure(tool, pythons, spec, work))
                row = rounds[tool][-1]
                print(f"round {i} {tool:10} {row['tokens'] / row['train_seconds']:,.0f} tokens/s", flush=True)
        results = {tool: summarise(rows) for tool, rows in rounds.items()}
        output = {"ratios": report(results), "results": results, "spec": SPEC, "rounds": rounds}
        if args.time_to:
            spec |= {"time_to": args.time_to, "time_limit": args.time_limit}
            output["time_to"] = {tool: measure(tool, pythons, spec, work) for tool in tools}
            print(json.dumps(output["time_to"], indent=1))
    output["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
    Path(args.out).write_text(json.dumps(output, indent=1))
    print(f"written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
