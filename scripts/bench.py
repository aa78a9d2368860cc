"""Speed beside other tools: the same interactions, sizes, loss, batch and number of threads, in one run.

    pip install -r requirements-dev.txt
    python scripts/bench.py --peers=recbole,rectools --data_dir=data --out=bench.json

Every tool reads the same interactions, trains SASRec-sized blocks (d = 64, 2 blocks, 2 heads, length 200,
batch 128, full softmax) and ranks all items for all users. Peers run in virtual environments of their own,
made here on first use, with their fast options (scripts/bench/run_*.py say which). Rounds alternate between
the tools; the table shows medians, with the range. --model_name=hstu: HSTU blocks, beside those of RecTools.

trained tokens/s   positions that the loss is taken at. An epoch of every tool trains the same ones.
positions/s        real positions (no padding) that go through the blocks. RecBole trains one target a row
                   and feeds all of its history again for the next one: 119 positions for a trained token.
epoch, s           seconds of a whole epoch: measured (ours), or from the timed steps (peers)
users/s            full ranking, top 10, seen items left out
preparation, s     raw file to first step, imports not counted; from the second round, when caches are warm
memory, GiB        peak resident memory of all processes of a tool
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

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
    "replay": ["replay-rec[torch]==0.22.0", "torch==2.13.0"],
}
SPEC = {
    "model_name": "llama", "dim": 64, "n_layers": 2, "n_heads": 2, "max_len": 200, "dropout": 0.2,
    "loss": "softmax", "batch_size": 128, "lr": 1e-3, "eval_batch_size": 256,
    "threads": 2, "ranks": 2, "steps": 24, "time_to": 0.0,
}  # fmt: skip
COLUMNS = {  # name: (heading, how it follows from what a worker writes)
    "train_tokens_per_s": ("trained tokens/s", lambda row: row["targets"] / row["train_seconds"]),
    "train_positions_per_s": ("positions/s", lambda row: row["positions"] / row["train_seconds"]),
    "epoch_seconds": ("epoch, s", lambda row: row["epoch_seconds"]),
    "eval_users_per_s": ("users/s", lambda row: row["eval_users"] / row["eval_seconds"]),
    "prepare_seconds": ("preparation, s", lambda row: row["prepare_seconds"]),
    "peak_memory_gib": ("memory, GiB", lambda row: row["peak_memory_gib"]),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", default="recbole,rectools", help=f"comma-separated: {', '.join(PACKAGES)}")
    parser.add_argument("--data_dir", help="as for main.py")
    parser.add_argument("--dataset", help="as for main.py")
    parser.add_argument("--model_name", default="llama", choices=["llama", "hstu"], help="blocks of ours")
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2: the first one fills our cache")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of a peer; ours runs whole epochs")
    parser.add_argument(
        "--time_to", type=float, default=0.15, help="seconds to this validation NDCG@10; 0 = no"
    )
    parser.add_argument("--time_limit", type=float, default=480.0, help="seconds a tool may take for that")
    parser.add_argument("--venvs", default=str(Path.home() / ".cache" / "reclm" / "bench"))
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    unknown = [name for name in args.peers if name not in PACKAGES]
    if unknown or args.rounds < 2 or args.steps < 1:
        raise UserError(f"--peers knows {', '.join(PACKAGES)}; --rounds is at least 2, --steps at least 1")
    if args.model_name == "hstu" and args.peers not in ([], ["rectools"]):
        raise UserError("only RecTools has HSTU blocks: use --peers=rectools with --model_name=hstu")
    if Path(args.out).exists():
        raise UserError(f"--out={args.out} exists and is not overwritten: name another file")
    return args


def make_venv(folder: Path, packages: list[str]) -> Path:
    """The Python of a peer's environment, which is made where it is missing."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        print(f"installing {packages[0]} into {folder} ...", flush=True)
        pip = [python, "-m", "pip", "install", "-q", *packages]
        for step in ([sys.executable, "-m", "venv", "--clear", folder], pip):
            ran = subprocess.run(step, capture_output=True, text=True)
            if ran.returncode:
                last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"cannot install {packages[0]}: {last}; leave it out of --peers")
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


def command(tool: str, pythons: dict, spec: dict) -> tuple[list, int]:
    """(how a tool is started, OMP threads of each of its processes): the total is the same for all."""
    script = HERE / "bench" / f"run_{tool}.py"
    if tool != "ours":
        return [pythons[tool], script], spec["threads"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={spec['ranks']}", script], spec["threads"] // spec["ranks"]


def measure(tool: str, pythons: dict, spec: dict, work: Path) -> dict:
    """One measurement in processes of its own."""
    result, file, log = work / "result.json", work / "spec.json", work / "log.txt"
    result.unlink(missing_ok=True)
    spec = SPEC | spec | {"result": str(result)}
    file.write_text(json.dumps(spec))
    start, threads = command(tool, pythons, spec)
    # A passive wait policy helps every tool on a shared machine; ours sets it by itself.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    env["RECLM_CACHE"] = str(work / "cache")
    with open(log, "w") as output:
        process = psutil.Popen([*start, file], cwd=work, env=env, stdout=output, stderr=output)
        peak = watch_memory(process)
    if not result.is_file():
        raise UserError(f"{tool} did not finish (exit {process.returncode}): {log.read_text()[-500:]}")
    return json.loads(result.read_text()) | {"peak_memory_gib": peak / 2**30}


def watch_memory(process: psutil.Popen) -> int:
    """Wait for the end of a process; returns the peak resident bytes of it and all its children."""
    peak = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # a child may end meanwhile
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(part.memory_info().rss for part in tree))
        time.sleep(0.1)
    return peak


def summarise(rows: list[dict]) -> dict:
    """Median and range of each column over the rounds."""
    values = {name: [value(row) for row in rows] for name, (_, value) in COLUMNS.items()}
    values["prepare_seconds"] = values["prepare_seconds"][1:]  # the first round is cold
    return {k: {"median": statistics.median(v), "min": min(v), "max": max(v)} for k, v in values.items()}


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(results: dict, ratios: dict) -> str:
    """Markdown: a row a tool with medians and ranges, and below each peer what ours is relative to it."""
    lines = [["", *(heading for heading, _ in COLUMNS.values())], ["---"] * (1 + len(COLUMNS))]
    for tool, summary in results.items():
        lines.append(
            [
                tool,
                *(
                    "{median} [{min}, {max}]".format(**{k: figure(v) for k, v in summary[name].items()})
                    for name in COLUMNS
                ),
            ]
        )
        if tool != "ours":
            lines.append([f"ours / {tool}", *(f"{figure(ratios[f'{name}.{tool}'])}" for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compare(results: dict) -> dict:
    """{"train_tokens_per_s.recbole": ours / theirs, ...} of the medians."""
    return {
        f"{name}.{tool}": results["ours"][name]["median"] / summary[name]["median"]
        for tool, summary in results.items()
        for name in COLUMNS
        if tool != "ours"
    }


def describe_time_to(score: float, reached: dict) -> str:
    lines = [f"seconds from the raw file to validation NDCG@10 {score}, ours with the default recipe:"]
    for tool, row in reached.items():
        seconds = row["reached_seconds"]
        done = f"{seconds:.0f}" if seconds else f"not in {row['seconds']:.0f} (best {row['best']:.4f})"
        lines.append(f"    {tool:10} {done}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    pythons = {name: make_venv(Path(args.venvs) / name, PACKAGES[name]) for name in args.peers}
    tools = ["ours", *args.peers]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        spec = write_interactions(args, work) | {"steps": args.steps, "model_name": args.model_name}
        rounds = {tool: [] for tool in tools}
        for i in range(args.rounds):
            for tool in tools:
                row = measure(tool, pythons, spec, work)
                rounds[tool].append(row)
                cells = [f"{heading} {figure(value(row))}" for heading, value in COLUMNS.values()]
                print(f"round {i} {tool:10} {'   '.join(cells)}", flush=True)
        results = {tool: summarise(rows) for tool, rows in rounds.items()}
        ratios = compare(results)
        print(f"\n{table(results, ratios)}\n", flush=True)
        used = SPEC | {"steps": args.steps, "model_name": args.model_name}
        output = {"ratios": ratios, "results": results, "spec": used, "rounds": rounds}
        if args.time_to:
            spec |= {"time_to": args.time_to, "time_limit": args.time_limit}
            output["time_to"] = {tool: measure(tool, pythons, spec, work) for tool in tools}
            print(describe_time_to(args.time_to, output["time_to"]))
    output |= {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": runs.commit(),
        "machine": runs.machine(),
    }
    Path(args.out).write_text(json.dumps(output, indent=1))
    print(f"written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
