"""Compare training and ranking speed with other libraries, at equal data, sizes, loss, batch and threads.

    pip install -r requirements-dev.txt
    python scripts/bench/peers.py --peers=recbole,rectools --data_dir=data --out=peers.json

Every tool reads the same interactions, trains SASRec-sized blocks (d = 64, 2 blocks, 2 heads, length 200,
batch 128, full softmax) and ranks all items for all users on the CPU. Peers run in their own virtual
environments, created on first use (needs network), with their fast options (see scripts/bench/run_*.py).
Rounds alternate between the tools; the table shows medians, with the range. --model_name=hstu compares HSTU
blocks with those of RecTools.

trained tokens/s   positions with a loss, per second. An epoch of every tool trains the same ones.
positions/s        real positions (no padding) that go through the blocks, per second. RecBole trains one
                   target per row and feeds its history again for the next: 119 positions per trained token.
epoch, s           seconds per epoch: measured (ours), or extrapolated from the timed steps (peers)
users/s            full ranking, top 10, seen items left out
preparation, s     raw file to first step, imports not counted, without any cache from an earlier run
memory, GiB        peak resident memory of all processes of a tool
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measure import arguments, compare, launcher, peak_of, say, show, table, write, write_csv

from data import load_dataset
from reclm.config import DataConfig
from reclm.errors import UserError, run_script

TORCH = "torch==2.13.0"
OLD = ["setuptools<80", "numpy==1.26.4", "pandas<2.3", "scipy<1.12"]  # the newest that work with RecBole
PACKAGES = {
    "recbole": ["recbole==1.2.1", TORCH, *OLD],
    "rectools": ["rectools[torch]==0.19.0", TORCH, "pyarrow<24"],
    "replay": ["replay-rec[torch]==0.22.0", TORCH],
}
SIZES = {"model_name": "llama", "dim": 64, "n_layers": 2, "n_heads": 2, "max_len": 200, "dropout": 0.2}
TRAINING = {"loss": "softmax", "batch_size": 128, "lr": 1e-3, "eval_batch_size": 256}
SPEC = SIZES | TRAINING | {"threads": 2, "ranks": 2, "steps": 24, "time_to": 0.0, "predict": False}


def columns(row: dict) -> dict[str, float]:
    """The columns of the table (see the module docstring) of one measurement."""
    return {
        "trained tokens/s": row["targets"] / row["train_seconds"],
        "positions/s": row["positions"] / row["train_seconds"],
        "epoch, s": row["epoch_seconds"],
        "users/s": row["eval_users"] / row["eval_seconds"],
        "preparation, s": row["prepare_seconds"],
        "memory, GiB": row["peak_memory_gib"],
    }


def read_args() -> argparse.Namespace:
    parser = arguments(__doc__, "peers.json")
    add_peers(parser, "recbole,rectools")
    parser.add_argument("--data_dir", help="folder of the data, as for main.py")
    parser.add_argument("--dataset", help="dataset, as for main.py")
    parser.add_argument("--model_name", default="llama", choices=["llama", "hstu"], help="kind of our blocks")
    parser.add_argument("--steps", type=int, default=24, help="timed steps per peer; ours runs whole epochs")
    parser.add_argument(
        "--time_to", type=float, default=0.15, help="also time until this valid NDCG@10; 0 = off"
    )
    parser.add_argument("--time_limit", type=float, default=480.0, help="seconds per tool for --time_to")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        raise UserError("--rounds and --steps must be at least 1")
    if args.model_name == "hstu" and args.peers not in ([], ["rectools"]):
        raise UserError("only RecTools has HSTU blocks: use --peers=rectools with --model_name=hstu")
    return args


def add_peers(parser: argparse.ArgumentParser, default: str, known: Iterable[str] = PACKAGES) -> None:
    """Add --rounds, --peers, parsed to a list of names in `known`, and --venvs, see `pythons_of`."""

    def names(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        if not set(chosen) <= set(known):
            raise UserError(f"--peers must be of {', '.join(known)}")
        return chosen

    folder = Path.home() / ".cache" / "reclm" / "bench"
    parser.add_argument(
        "--peers",
        type=names,
        default=default,
        help=f"comma-separated: {', '.join(known)} [default: {default}]",
    )
    parser.add_argument("--venvs", type=Path, default=folder, help="folder for the peers' environments")
    parser.add_argument("--rounds", type=int, default=3, help="of all tools in turn")


def pythons_of(args: argparse.Namespace, packages: dict[str, list[str]] = PACKAGES) -> dict[str, Path]:
    """{peer: the Python of its environment in --venvs}, created where missing."""
    return {name: make_venv(args.venvs / name, packages[name]) for name in args.peers}


def make_venv(folder: Path, packages: list[str]) -> Path:
    """The Python of a peer's virtual environment, created if missing. Raises UserError if pip fails."""
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        say(f"installing {packages[0]} into {folder} ...")
        pip = [python, "-m", "pip", "install", "-q", *packages]
        for step in ([sys.executable, "-m", "venv", "--clear", folder], pip):
            ran = subprocess.run(step, capture_output=True, text=True)
            if ran.returncode:
                last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"cannot install {packages[0]}: {last}; leave it out of --peers")
        done.touch()
    return python


def write_interactions(args: argparse.Namespace, work: Path) -> dict:
    """Write the dataset as CSV and as RecBole's .inter -> {"csv": path, "inter": path}. The timestamp of a
    row is its position in the user's sequence."""
    dataset = load_dataset(DataConfig(dataset=args.dataset, data_dir=args.data_dir))
    csv, inter = work / "interactions.csv", work / "bench" / "bench.inter"
    inter.parent.mkdir()
    columns = dataset.owner, dataset.item_ids, dataset.place
    write_csv(csv, *columns)
    write_csv(inter, *columns, header="user_id:token\titem_id:token\ttimestamp:float")
    size = f"{dataset.num_users:,} users, {dataset.num_items:,} items, {len(dataset.item_ids):,} rows"
    say(f"data: {dataset.name}, {size}")
    return {"csv": str(csv), "inter": str(inter)}


def run_tool(tool: str, pythons: dict, spec: dict, work: Path) -> dict:
    """Run one measurement in its own processes, with spec["threads"] threads in total -> the result of
    scripts/bench/run_<tool>.py and the peak memory. Raises UserError if it fails."""
    result, file, cache = work / "result.json", work / "spec.json", work / "cache"
    result.unlink(missing_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    spec = SPEC | spec | {"result": str(result)}
    file.write_text(json.dumps(spec))
    ranks = spec["ranks"] if tool == "ours" else 1
    start = launcher(ranks) if tool == "ours" else [pythons[tool]]
    script = Path(__file__).with_name(f"run_{tool}.py")
    env = {"OMP_NUM_THREADS": str(spec["threads"] // ranks), "RECLM_CACHE": str(cache)}
    peak = peak_of([*start, script, file], work, **env)
    return json.loads(result.read_text()) | {"peak_memory_gib": peak}


def results_of(rounds: dict[str, list[dict]]) -> dict[str, dict]:
    """{tool: {column: median and range}}, and after each peer the ratio of ours to it."""
    return compare({tool: [columns(row) for row in rows] for tool, rows in rounds.items()})


def describe_time_to(score: float, reached: dict) -> str:
    """A Markdown table of the seconds per tool until validation NDCG@10 reaches `score`."""
    title = f"from the raw file to validation NDCG@10 {score}, ours with the default recipe"
    return table(
        {title: tool, "s": row["reached_seconds"] or f"not in {row['seconds']:.0f}", "best": row["best"]}
        for tool, row in reached.items()
    )


def main() -> None:
    args = read_args()
    pythons = pythons_of(args)
    rounds = {tool: [] for tool in ("ours", *args.peers)}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given = {"steps": args.steps, "model_name": args.model_name}
        spec = write_interactions(args, work) | given
        for i in range(args.rounds):
            for tool, rows in rounds.items():
                rows.append(run_tool(tool, pythons, spec, work))
                show(f"round {i}, {tool}", columns(rows[-1]))
        results = results_of(rounds)
        say(table({"": name} | row for name, row in results.items()))
        output = {"results": results, "spec": SPEC | given, "rounds": rounds}
        if args.time_to:
            spec |= {"time_to": args.time_to, "time_limit": args.time_limit}
            output["time_to"] = {tool: run_tool(tool, pythons, spec, work) for tool in rounds}
            say(describe_time_to(args.time_to, output["time_to"]))
    write(args.out, output)


if __name__ == "__main__":
    run_script(main)
