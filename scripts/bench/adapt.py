"""Adapt a trained model to other data in eleven ways, and compare: quality, size, steps, what is forgotten.

    pip install -r requirements-adapt.txt
    python scripts/bench/adapt.py --work=adapt                # all; two to three hours on one core
    python scripts/bench/adapt.py --work=adapt --only=films --seeds=1
    python scripts/bench/adapt.py --markets=FOLDER            # only write the files of the markets

films      MovieLens-1M -> MovieLens-100K: other users, films found by title and year
toys       Amazon Beauty -> Toys and Games, other users and items
beauty     Toys and Games -> Beauty
horror     MovieLens-1M without every fifth user -> the horror films that these saw
childrens  the same for children's films

The base of each is trained once. The rate of each row is chosen on validation, with seed 0, from two. Then
main.py trains every seed, the best epoch on validation is tested, and a line goes to --out. What is in --out
is not run again, and a run that was interrupted is resumed. Amazon's files (`user item item ...`, in time
order) are expected in --amazon [amazon/ of the data folder].
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import pandas as pd
import torch
from torch import nn

import main as program
from evaluate import evaluate, rank_users
from reclm.config import Config, DataConfig, build_config
from reclm.data.dataset import Dataset
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.run import init_from, report
from reclm.run.checkpoint import load_checkpoint
from reclm.run.output import ScriptParser, write_whole

MODEL = ["--optimizer=adamw", "--position_embedding=true", "--gated_residuals=true"]
FILMS = [*MODEL, "--loss=softmax"]
SHOPS = [*MODEL, "--max_len=50", "--dropout=0.4", "--loss=sampled_softmax", "--batch_size=256"]
GENRES = {"horror": "Horror", "childrens": "Children's"}
NEW_USERS = 5  # one in so many is a user of the markets
ADAPTER = ("--adapter=lora", "--adapter_rank=4")
AND_TABLE = "--adapter_targets=wq,wk,wv,wo,w1,w2,w3,table"
ROWS = {  # name: flags
    "zero-shot": [],
    "full": [],
    "scratch": [],
    "blocks": ["--train_only=blocks"],
    "table": ["--train_only=table"],
    "lora-1": ["--adapter=lora", "--adapter_rank=1"],
    "lora-4": [*ADAPTER],
    "lora-16": ["--adapter=lora", "--adapter_rank=16"],
    "lora-4+table": [*ADAPTER, AND_TABLE],
    "lora-16+table": ["--adapter=lora", "--adapter_rank=16", AND_TABLE],
    "dora-4": ["--adapter=dora", "--adapter_rank=4"],
}
# Where all items are new, these are as full and LoRA of the blocks.
NO_TABLE = [row for row in ROWS if row not in ("blocks", "lora-4+table", "lora-16+table")]
RATES = {"lora": ("1e-2", "3e-2"), "dora": ("1e-2", "3e-2")}  # for rows that begin so
USUAL_RATES = ("3e-3", "1e-2")


@dataclass
class Experiment:
    base: list[str]  # flags of the run to start from
    target: list[str]  # of all others
    match: str  # --init_match
    base_epochs: int
    epochs: int
    rows: list[str] = field(default_factory=lambda: list(ROWS))


def experiments(work: Path, amazon: Path) -> dict[str, Experiment]:
    markets = work / "markets"
    beauty, toys = ([f"--dataset={amazon / name}.txt", *SHOPS] for name in ("Beauty", "Toys_and_Games"))
    large, small, base, *parts = (
        [f"--dataset={name}", *FILMS]
        for name in ("ml-1m", "ml-100k", *(markets / f"{name}.csv" for name in ("base", *GENRES)))
    )
    return {
        "films": Experiment(large, small, "title", 8, 10),
        "toys": Experiment(beauty, toys, "none", 15, 10, NO_TABLE),
        "beauty": Experiment(toys, beauty, "none", 15, 10, NO_TABLE),
    } | {name: Experiment(base, part, "id", 8, 10) for name, part in zip(GENRES, parts, strict=True)}


# ---------------------------------------------------------------- data


def write_markets(folder: Path) -> None:
    """Write base.csv, all actions of four users in five, and for each market those of the others on films of
    its genre. Items that a file lacks get a user of one action, who is neither trained on nor evaluated, so
    that all files number the items alike."""
    films = program.load_dataset(DataConfig(dataset="ml-1m"))
    others = films.owner % NEW_USERS == 0
    parts = {"base": ~others}
    for name, genre in GENRES.items():
        of_genre = np.array([genre in text.split("|") for text in films.genre_names.tolist()])
        parts[name] = others & of_genre[films.item_ids - 1]
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        {
            "user": films.users[films.owner],
            "item": films.items[films.item_ids - 1],
            "timestamp": films.timestamps.astype(int),
        }
    )
    titles = pd.DataFrame({"item": films.items, "title": films.titles})
    for name, rows in parts.items():
        missing = np.setdiff1d(films.items, table["item"][rows])
        fillers = pd.DataFrame({"user": [f"none{item}" for item in missing], "item": missing, "timestamp": 0})
        content = pd.concat([table[rows], fillers])
        write_whole(folder / f"{name}.csv", lambda path, content=content: content.to_csv(path, index=False))
        write_whole(folder / f"{name}.items.csv", lambda path: titles.to_csv(path, index=False))


# ---------------------------------------------------------------- runs


def train(flags: list[str], folder: Path) -> dict:
    """The result.json of a run of main.py in `folder`, which goes on where it was interrupted."""
    if not (folder / "result.json").is_file():
        sys.argv = ["main.py", *flags]  # noted in result.json
        program.train(parse_args([*flags, f"--out_dir={folder}", "--resume=auto", "--keep_last=1"]))
    return json.loads((folder / "result.json").read_text())


def flags_of(experiment: Experiment, row: str, rate: str, seed: int, base: Path) -> list[str]:
    start = [] if row == "scratch" else [f"--init_from={base}", f"--init_match={experiment.match}"]
    if experiment.match == "id":
        start = start[:1]  # the default
    epochs = [f"--num_epochs={experiment.epochs}", f"--lr={rate}", f"--seed={seed}"]
    return [*experiment.target, *epochs, *start, *ROWS[row]]


def gains(model: nn.Module, dataset: Dataset, cfg: Config) -> np.ndarray:
    """(users,) NDCG@10 of each test user, in the order of their numbers"""
    users, ranks, _ = rank_users(model, dataset, "test", cfg.eval)
    found = torch.where(ranks <= 10, 1 / torch.log2(1 + ranks), 0)
    return found[users.argsort()].numpy()


def opened(flags: list[str], path: Path | None = None) -> tuple[Config, Dataset, nn.Module]:
    """Settings, data and a model: with the weights of a checkpoint, or as a run with these flags starts."""
    if path is not None:
        return program.open_checkpoint({}, path)
    cfg = build_config(parse_args(flags))
    dataset = program.open_dataset(cfg)
    return cfg, dataset, program.Run(cfg, dataset, program.build_model(cfg, dataset)).model


def on_source(base: Path, adapted: nn.Module, place: np.ndarray) -> float:
    """Test NDCG@10 on the data of the base with the weights that it shares with an adapted model, those of
    items included, replaced by those of the latter; `place` is that of init_from.find_items."""
    cfg, source, model = program.open_checkpoint({}, base)
    weights, theirs = model.state_dict(), adapted.state_dict()
    table = weights[init_from.ITEMS].clone()
    shared = {name: theirs[name] for name in weights if theirs[name].shape == weights[name].shape}
    there = torch.from_numpy(place >= 0)
    table[1:][torch.from_numpy(place)[there]] = theirs[init_from.ITEMS][1:][there]
    model.load_state_dict(weights | shared | {init_from.ITEMS: table})
    return evaluate(model, source, "test", cfg.eval)["NDCG@10"]


def sizes(folder: Path, new: int) -> dict[str, int]:
    """Of a run: trained parameters, bytes that its data need on disk next to the base, those of them that the
    vectors of `new` items take whatever is trained, bytes of the optimizer"""
    state = load_checkpoint(folder / "last.pth")
    moments = [values["exp_avg"].numel() for values in state["optimizer"]["state"].values()]
    tensors = [x for values in state["optimizer"]["state"].values() for x in values.values()]
    file = folder / "adapter.safetensors"
    return {
        "trained": sum(moments),
        "file": file.stat().st_size if file.is_file() else 4 * sum(moments),
        "new": 4 * new * state["config"]["dim"],
        "optimizer": sum(x.numel() * x.element_size() for x in tensors),
    }


def steps_to(folder: Path, zero: float, steps: int) -> int:
    """Of all `steps` of a run, those to the first epoch with 95 % of its gain on validation over `zero`; 0
    without a gain"""
    values = [row["valid/NDCG@10"] for row in read_lines(folder / "metrics.jsonl")]
    wanted = zero + 0.95 * (max(values) - zero)
    first = next((epoch for epoch, value in enumerate(values, 1) if value >= wanted > zero), 0)
    return round(first * steps / len(values))


# ---------------------------------------------------------------- rows


class Bench:
    """One experiment. Its runs are in `work`, its lines in `out`."""

    def __init__(self, name: str, experiment: Experiment, work: Path, out: Path):
        self.name, self.experiment, self.work, self.out = name, experiment, work / name, out
        epochs = f"--num_epochs={experiment.base_epochs}"
        self.base_flags = [*experiment.base, epochs, "--lr=6e-3", "--ema=0.99"]
        data = experiment.base[0].partition("=")[2]
        self.base = work / f"base-{Path(data).stem}" / "best.pth"

    def run(self, seeds: int) -> None:
        train(self.base_flags, self.base.parent)
        for row in self.experiment.rows:
            for seed in range(seeds):
                if self.found(row, seed) is None:
                    line = self.line(row, seed)
                    with open(self.out, "a") as file:
                        file.write(json.dumps(line) + "\n")

    def found(self, row: str, seed: int) -> dict | None:
        lines = read_lines(self.out) if self.out.is_file() else []
        key = (f"adapt/{self.name}/{row}", seed)
        return next((line for line in lines if (line["run"], line["seed"]) == key), None)

    def line(self, row: str, seed: int) -> dict:
        """The record of a row, for which it is trained"""
        rate, folder = USUAL_RATES[0], None
        if row != "zero-shot":
            rate = self.choose_rate(row)
            folder = self.folder(row, rate, seed)
        flags = flags_of(self.experiment, row, rate, seed, self.base)
        result = train(flags, folder) if folder else {}
        cfg, dataset, model = opened(flags, folder and folder / "best.pth")
        self.work.mkdir(parents=True, exist_ok=True)
        of_users = gains(model, dataset, cfg)
        np.save(self.work / f"{row}-{seed}.npy", of_users)
        line = {
            "run": f"adapt/{self.name}/{row}",
            "seed": seed,
            "commands": self.commands(row, flags),
            **{name: report.stamp()[name] for name in ("commit", "machine")},
            "date": time.strftime("%Y-%m-%d"),
        }
        for split in ("valid", "test"):
            metrics = evaluate(model, dataset, split, cfg.eval)
            line[split] = {name: round(metrics[name], 6) for name in ("HR@10", "NDCG@10")}
        zero, full = (self.of_users(other, seed) for other in ("zero-shot", "full"))
        if full is not None:
            line["kept"] = (of_users - zero).mean() / (full - zero).mean()  # share of the gain
            line["to_full"] = paired(of_users, full)
        match = self.experiment.match
        place = init_from.find_items(self.base, load_checkpoint(self.base), dataset, match)
        if row != "scratch":
            line["source"] = {"NDCG@10": on_source(self.base, model, place)}
        if folder:
            steps = load_checkpoint(folder / "last.pth")["progress"]["epoch"]
            steps *= len(program.TrainBatches(dataset, cfg.model.max_len, cfg.loss, cfg.train))
            zero = self.found("zero-shot", seed)["valid"]["NDCG@10"]
            line |= {
                "minutes": round(result["seconds"] / 60, 2),
                "bytes": sizes(folder, int((place < 0).sum())),
            }
            line["steps"] = steps_to(folder, zero, steps)
        return line

    def folder(self, row: str, rate: str, seed: int) -> Path:
        return self.work / f"{row}-{rate}-{seed}"

    def choose_rate(self, row: str) -> str:
        """The better of two on validation, with seed 0"""
        rates, scores = RATES.get(row.partition("-")[0], USUAL_RATES), {}
        for rate in rates:
            flags = flags_of(self.experiment, row, rate, 0, self.base)
            scores[rate] = train(flags, self.folder(row, rate, 0))["valid"]["NDCG@10"]
        return max(scores, key=scores.get)

    def of_users(self, row: str, seed: int) -> np.ndarray | None:
        path = self.work / f"{row}-{seed}.npy"
        return np.load(path) if path.is_file() else None

    def commands(self, row: str, flags: list[str]) -> list[str]:
        """As scripts/results.py --check runs them"""
        if row == "zero-shot":  # a start without a run
            return [f"python scripts/bench/adapt.py --work=$OUT --only={self.name} --rows={row} --seeds=1"]
        lines = ["python scripts/bench/adapt.py --markets=$OUT/markets"] * (self.name in GENRES)
        lines += [f"python main.py {' '.join(self.base_flags)} --out_dir=$OUT/base"]
        lines += [f"python main.py {' '.join(flags)} --out_dir=$OUT/run"]
        moved = {str(self.base.parent): "$OUT/base", str(self.work.parent / "markets"): "$OUT/markets"}
        for here, there in moved.items():
            lines = [line.replace(here, there) for line in lines]
        return lines


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean difference of the users' NDCG@10, and its standard error"""
    difference = ours - theirs
    return {"mean": difference.mean(), "se": difference.std(ddof=1) / math.sqrt(len(difference))}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("--work", type=Path, help="folder of the runs, new or of an interrupted bench")
    add("--out", type=Path, help="records to add to [WORK/adapt.jsonl]")
    add("--only", help="some of the experiments, separated by commas")
    add("--rows", help="some of the rows, separated by commas")
    add("--seeds", type=int, default=3, help="seeds of each row [3]")
    add("--epochs", type=int, help="of every run [8 to 15]")
    add("--amazon", type=Path, help="folder of Amazon's files [amazon/ of the data folder]")
    add("--markets", type=Path, help="only write the files of the markets to this folder")
    args = parser.parse_args()
    if args.markets:
        return write_markets(args.markets)
    if not args.work:
        raise UserError("--work=FOLDER is missing: where the runs go")
    known = experiments(args.work, args.amazon or Path(DataConfig().folder) / "amazon")
    chosen = chosen_of("only", args.only, known)
    rows = {"zero-shot", *chosen_of("rows", args.rows, ROWS)}  # each gain is one over zero-shot
    if GENRES.keys() & set(chosen) and not (args.work / "markets" / "base.csv").is_file():
        write_markets(args.work / "markets")
    for name in chosen:
        experiment = known[name]
        experiment.rows = [row for row in experiment.rows if row in rows]
        if args.epochs:
            experiment.epochs = experiment.base_epochs = args.epochs
        Bench(name, experiment, args.work, args.out or args.work / "adapt.jsonl").run(args.seeds)


def chosen_of(flag: str, given: str | None, known: dict) -> list[str]:
    names = given.split(",") if given else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--{flag}: there is no {unknown[0]!r:.60}, but {', '.join(known)}")
    return names


if __name__ == "__main__":
    run_script(main)
