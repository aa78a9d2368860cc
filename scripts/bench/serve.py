"""Measure how a trained model recommends: to all users, in sessions, over HTTP, among many items, exported.

    pip install -r requirements-dev.txt -r requirements-export.txt -r requirements-serve.txt
    python scripts/bench/serve.py --ckpt_name=runs/latest/best.pth --data_dir=data --update
    python scripts/bench/serve.py --ckpt_name=runs/latest/best.pth --parts=session,why --out=new.json

batch    users/s from a loaded model and the users to arrays of their ten best unseen items, and other tools
         by pip; are the files that scripts/recommend.py writes with 1, 2 and 3 processes the same?
session  ms to add an action and recommend, beside reading the whole history; also with a large random model
http     requests/s and ms of scripts/serve.py, in a burst of ten times the load, and for --soak seconds
items    ms to score a million items and choose the best, beside those to read their vectors once
export   bytes and quality of the exported model, float32 and int8, beside the checkpoint
why      ms to explain ten recommendations by fifty past items
page     ms from an edit of a history to the new list, in Chromium: served, and as a file without a server
start    seconds and memory of one recommendation on the command line

Each figure is the median over the rounds, with the range; in a round all take their turn. All but batch and
the servers use one thread. The load average is noted before and after each part: other jobs change every
figure. The checkpoint should be one of `python main.py --dataset=ml-1m`. Peers are installed by pip into
environments of their own. Linux only.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported; what takes more is a process of its own
sys.path.insert(0, str(Path(__file__).parent))

import load
import pages
import pair
import passes
import peers
import psutil
from measure import cell, launcher, peak_of, say, summary

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, write_whole
from reclm.run.report import stamp
from reclm.serve import Recommender
from reclm.serve.choose import add_model_flags, model_path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "configs" / "records" / "bench_serve.json"
PACKAGES = peers.PACKAGES | {"implicit": ["implicit==0.7.3"]}
PEERS = ("implicit", "rectools", "replay")
NEEDED = {  # by parts
    "http": ("fastapi", "uvicorn"),
    "page": ("fastapi", "uvicorn", "playwright"),
    "export": ("onnxscript", "onnxruntime"),
}
TYPED = "Toy Story (1995); Heat (1995); The Matrix"
STARTS = 5  # rounds of `start`
LARGE = {"dim": 256, "n_layers": 8, "n_heads": 8, "max_len": 1000}
LARGE_ITEMS = 20_000


@dataclass
class Bench:
    """What the parts measure, and a folder for what they write."""

    args: argparse.Namespace
    model: Path  # the checkpoint
    work: Path

    @cached_property
    def recommender(self) -> Recommender:
        return Recommender.load(self.model)

    @cached_property
    def models(self) -> dict[str, Path]:
        """{"torch": the checkpoint, "exported": its export}; without the latter where it cannot be made"""
        return self.in_each_runtime("exported", self.model)

    @cached_property
    def large(self) -> dict[str, Path]:
        """The same for a model that is large and as good as random: it was trained for one step"""
        say("making a large random model ...")
        data, folder = self.work / "large.csv", self.work / "large"
        pair.write_made_up(data, LARGE_ITEMS, users=8)
        flags = [f"--{name}={value}" for name, value in LARGE.items()]
        command = ["main.py", *flags, f"--dataset={data}", f"--out_dir={folder}", "--num_epochs=1"]
        peak_of([sys.executable, *command, "--device=cpu"], ROOT, RECLM_CACHE=str(self.work / "cache"))
        return self.in_each_runtime("large exported", folder / "best.pth")

    def in_each_runtime(self, name: str, model: Path) -> dict[str, Path]:
        exports = {} if lacking("export") else {"exported": self.export(name, model)}
        return {"torch": model} | exports

    def export(self, name: str, model: Path, *flags: str) -> Path:
        """The folder or file of an export, written if it is not there."""
        folder = self.work / name
        if not folder.exists():
            say(f"exporting: {name} ...")
            script = [sys.executable, ROOT / "scripts" / "export.py"]
            peak_of([*script, f"--ckpt_name={model}", f"--out={folder}", *flags], self.work)
        return folder


def lacking(part: str) -> list[str]:
    """The packages that a part needs and that are not installed."""
    return [name for name in NEEDED.get(part, ()) if not importlib.util.find_spec(name)]


# ---------------------------------------------------------------- batch and start, in other processes


def batch(bench: Bench) -> dict:
    """users/s of ours and other tools, two threads each; whether files depend on the number of processes"""
    pythons = peers.pythons_of(bench.args, PACKAGES)
    spec = {"steps": 1, "predict": True}  # hardly trained: speed does not depend on the weights
    if pythons:
        spec |= peers.write_interactions(bench.args, bench.work)
    tools = {
        "ours, 2 processes": lambda: to_everybody(bench, 2),
        "ours, 1 process": lambda: to_everybody(bench, 1),
    }
    for name in pythons:
        tools[name] = lambda name=name: peers.run_tool(name, pythons, spec, bench.work)
    rounds = {name: [] for name in tools}
    for _ in range(bench.args.rounds):
        for name, run in tools.items():
            found = run()
            rounds[name].append({"users/s": found["eval_users"] / found["eval_seconds"]})
    files = {file_for_everybody(bench, processes) for processes in (1, 2, 3)}
    return {"rounds": rounds, "files of 1, 2, 3 processes": "equal" if len(files) == 1 else "DIFFERENT"}


def to_everybody(bench: Bench, processes: int) -> dict:
    """The result of run_serving.py, with two threads in all"""
    file, result = bench.work / "spec.json", bench.work / "result.json"
    file.write_text(json.dumps({"model": str(bench.model), "result": str(result)}))
    script = Path(__file__).with_name("run_serving.py")
    peak_of([*launcher(processes), script, file], bench.work, OMP_NUM_THREADS=str(2 // processes))
    return json.loads(result.read_text())


def file_for_everybody(bench: Bench, processes: int) -> bytes:
    """What scripts/recommend.py writes"""
    out = bench.work / f"everybody-{processes}.parquet"
    script = [*launcher(processes), ROOT / "scripts" / "recommend.py"]
    peak_of([*script, f"--ckpt_name={bench.model}", "--users=all", f"--out={out}"], bench.work)
    return out.read_bytes()


def start(bench: Bench) -> dict:
    """Seconds and memory of scripts/recommend.py for a typed history"""
    rounds = {name: [] for name in bench.models}
    for _ in range(STARTS):
        for name, model in bench.models.items():
            script = [sys.executable, ROOT / "scripts" / "recommend.py", f"--ckpt_name={model}"]
            command = [*script, f"--history={bench.args.history}", "--k=5"]
            begin = time.perf_counter()
            passes.run(command)
            row = {"seconds": time.perf_counter() - begin}
            rounds[name].append(row | {"memory, MiB": 1024 * peak_of(command, bench.work)})
    return {"rounds": rounds}


PARTS = {
    "batch": batch,
    "session": passes.session,
    "http": load.http,
    "items": passes.items,
    "export": passes.export,
    "why": passes.why,
    "page": pages.page,
    "start": start,
}


# ---------------------------------------------------------------- the record


def read_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add_model_flags(parser)
    peers.add_peers(parser, ",".join(PEERS), PEERS)
    parser.add_argument("--data_dir", help="folder of the data that the peers read, as for main.py")
    parser.add_argument("--dataset", default="ml-1m", help="the same for its name [ml-1m]")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} [all that can run]")
    parser.add_argument("--soak", type=float, default=600, help="seconds of the last test over HTTP [600]")
    parser.add_argument("--history", default=TYPED, help=f"typed in `start` [{TYPED}]")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to write [{RECORD.name}]")
    parser.add_argument(
        "--update", action="store_true", help="replace the measured parts of an existing --out"
    )
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if not set(args.parts) <= set(PARTS):
        raise UserError(f"--parts must be of {', '.join(PARTS)}")
    if args.rounds < 1 or args.soak < 0:
        raise UserError("--rounds must be at least 1, and --soak 0 or more")
    if args.out.exists() and not args.update:
        raise UserError(f"{args.out} exists: name another file, or add --update to replace parts of it")
    return args


def measured(part: str, bench: Bench) -> dict:
    """A part of the record: what it found as {name: {column: `summary`}}, and under which circumstances."""
    load_before, begin, circumstances = os.getloadavg()[0], time.time(), stamp()
    say(f"{part}: load average {load_before:.2f}")
    found = PARTS[part](bench)
    rounds = found.pop("rounds")
    found["results"] = {
        name: {column: summary([row[column] for row in rows]) for column in rows[0]}
        for name, rows in rounds.items()
    }
    others = {name: value for name, value in found.items() if name != "results"}
    for name, value in (found["results"] | others).items():
        for column, figure in value.items() if isinstance(value, dict) else [("", value)]:
            say(f"{part}: {name}{', ' * bool(column)}{column}: {cell(figure)}")
    load_after = os.getloadavg()[0]
    say(f"{part}: load average {load_after:.2f}, {time.time() - begin:.0f} s\n")
    flags = (
        f"--parts={part} --rounds={bench.args.rounds} --soak={bench.args.soak:g}"  # paths differ elsewhere
    )
    circumstances |= {"command": f"python scripts/bench/serve.py {flags}"}
    return circumstances | {"load": {"before": load_before, "after": load_after}} | found | {"rounds": rounds}


def hardware() -> dict:
    """The processor, cores and GiB of this machine"""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count(), "memory, GiB": round(memory, 1)}


def main() -> None:
    args = read_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    model = model_path(args.ckpt_name, args.out_dir)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, model.resolve(), Path(folder))
        about = bench.recommender.about
        record |= stamp() | hardware() | {"model": f"{about.dataset}, {about.protocol}, {about.trained}"}
        for part in args.parts:
            if missing := lacking(part):
                say(f"{part} is left out: {missing[0]} is not installed")
                continue
            record[part] = measured(part, bench)
            text = json.dumps(record, indent=1)
            write_whole(args.out, lambda path, text=text: path.write_text(text + "\n"))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
