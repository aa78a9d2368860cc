"""The model card (README.md) of a model for the hub, written by scripts/push_to_hub.py: every number on it is
one of result.json, of the checkpoint, or of configs/records/."""

import json
import shlex
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath

import numpy as np
from results import RECORDS, ROOT, read_records, read_result, spread

from reclm.config import build_config, fixed_names
from reclm.data.histories import FILE, read_histories
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.serve import hub
from reclm.serve.catalogue import Catalogue
from reclm.serve.person import Reads
from reclm.serve.trained import read_catalogue, read_reads

METRICS = {"matching": ("HR@10", "NDCG@10"), "ctr": ("AUC", "logloss")}  # per task: those on the card
SETTLED = {
    "exclude_history",
    "filter_seen",
    "repeats",
    "warmup_steps",
    "ctr_history",
    "ctr_delay",
    "ctr_split",
}
NAMES = {
    "ml-1m": "MovieLens-1M",
    "ml-1m-sasrec": "MovieLens-1M (SASRec's ml-1m.txt)",
    "ml-1m-m1": "MovieLens-1M (reczoo's Movielens1M_m1)",
    "ml-100k": "MovieLens-100K",
    "movielens-latest-x1": "MovieLens Latest (reczoo's MovielensLatest_x1)",
}
MOVIELENS_URL = "https://grouplens.org/datasets/movielens/"
MOVIELENS_TERMS = f"""MovieLens may be used for research. It may not be redistributed, nor used commercially,
without permission of the GroupLens research group ({MOVIELENS_URL}), so this repository
has ids of films and how often each was rated, but no titles, genres or ratings. Cite F. Maxwell
Harper and Joseph A. Konstan: The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4 (2015), https://doi.org/10.1145/2827872."""


@dataclass
class Published:
    """What a card is about: the checkpoint at `path` with its `state`, written to `folder` as `repo`."""

    state: dict
    path: Path
    folder: Path
    repo: str
    licence: str | None = None  # of the weights

    @cached_property
    def config(self) -> dict:
        return build_config(self.state["config"]).flat()

    @cached_property
    def is_movielens(self) -> bool:
        return hub.is_movielens(self.state)

    @property
    def is_whole(self) -> bool:
        """Are the data all of those that their name stands for? See sources.check_size."""
        return not self.state["protocol"].startswith("not ")

    @cached_property
    def catalogue(self) -> Catalogue:
        return read_catalogue(self.state)

    @cached_property
    def reads(self) -> Reads:
        return read_reads(build_config(self.state["config"]), self.state)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        return METRICS[self.config["task"]]

    @cached_property
    def row(self) -> dict:
        """The log row of the checkpoint's epoch; empty in mid-epoch"""
        epoch = self.state["progress"].get("epoch", 0) - 1
        return next((row for row in self.state["history"] if row["epoch"] == epoch), {})

    @cached_property
    def result(self) -> dict | None:
        """result.json beside the checkpoint, where it is about these weights: their data, seed and epoch"""
        path = self.path.parent / "result.json"
        if not path.is_file():
            return None
        found = read_result(path)
        ours = (self.state["fingerprint"], self.config["seed"], self.row.get("epoch"))
        return found if ours == (found.get("fingerprint"), found["seed"], found["best_epoch"]) else None

    def score(self, split: str, metric: str) -> float | None:
        if self.result:
            return self.result[split].get(metric)
        return self.row.get(f"valid/{metric}") if split == "valid" else None

    @property
    def data_name(self) -> str:
        return NAMES.get(self.state["dataset"], self.state["dataset"])


def write_card(about: Published) -> Path:
    """Write README.md into the folder. Raises UserError for a damaged result.json."""
    sections = (what_it_is, numbers, data, training, usage, limits, files)
    body = "\n\n".join(section(about) for section in sections)
    path = about.folder / hub.CARD
    path.write_text(f"---\n{header(about)}\n---\n\n{body}\n", encoding="utf-8")
    return path


def header(about: Published) -> str:
    """The YAML header."""
    from huggingface_hub import EvalResult, ModelCardData  # slow to import and only needed here

    task = {"matching": "sequential-recommendation", "ctr": "click-through-rate-prediction"}
    found = [
        EvalResult(
            task_type=task[about.config["task"]],
            dataset_type=about.state["dataset"],
            dataset_name=about.data_name,
            dataset_split={"valid": "validation"}.get(split, split),
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=round(about.score(split, metric), 4),
        )
        for split in ("valid", "test")
        for metric in about.metrics
        if about.score(split, metric) is not None
    ]
    other = {"license": "other", "license_name": "not-chosen"}
    if about.is_movielens:
        other |= {"license_name": "movielens-terms", "license_link": MOVIELENS_URL}
    return ModelCardData(
        **({"license": about.licence} if about.licence else other),
        library_name=hub.FORMAT,
        tags=["recommendation", "sequential-recommendation", about.config["model_name"], "safetensors"],
        datasets=[about.state["dataset"]],
        model_name=about.repo.partition("/")[2],
        eval_results=found or None,
    ).to_yaml()


# ---------------------------------------------------------------- sections


def what_it_is(about: Published) -> str:
    cfg, num_items = about.config, len(about.catalogue)
    blocks = {"llama": "LLaMA", "hstu": "HSTU"}.get(cfg["model_name"], cfg["model_name"])
    job = f"ranks {num_items:,} items as the next one of a person"
    if cfg["task"] == "ctr":
        job = f"predicts the probability that a person responds to one of {num_items:,} items"
    size = sum(weight.numel() for weight in about.state["model"].values())
    return f"""# {about.repo.partition("/")[2]}

A sequential recommender of Toy-RecLM: from what a person has done so far, in order, it {job}.
{plural(cfg["n_layers"], f"{blocks} block")} of width {cfg["dim"]} over the last {cfg["max_len"]} actions;
{size:,} weights in training."""


def plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")


def numbers(about: Published) -> str:
    protocol = f"Protocol: {about.state['protocol']}."
    if about.config["task"] == "matching":
        seen = "kept in" if about.config["filter_seen"] is False else "left out"
        protocol += (
            " Of each person, the last item is the test item and the one before it the validation item. It "
            f"is ranked among all items (full ranking), with those of the person's history {seen}."
        )
    heads = [f"{metric}, {split}" for metric in about.metrics for split in ("validation", "test")]
    rows = [[f"this model, seed {about.config['seed']}", *cells(about, lambda *at: own(about.score(*at)))]]
    name, seeds = best_record(about)
    if len(seeds) > 1:
        title = f"the same settings, {len(seeds)} seeds (records `{name}`; mean ± sample standard deviation)"
        rows.append([title, *cells(about, lambda *at: over_seeds(seeds, *at))])
        note = f"The records are of {seeds[0]['machine']}, commit {seeds[0]['commit']}."
    else:
        note = "One seed: for these settings no spread over seeds is recorded."
    if counted := popularity(about):
        rows.append(["popularity, which only counts", *cells(about, lambda *at: over_seeds(counted, *at))])
    if about.result is None:
        note += " The test metrics of these weights were not measured."
    elif "num_users" in about.result:
        note += f" {about.result['num_users']:,} users are evaluated."
    table = [["", *heads], ["---"] * (len(heads) + 1), *rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    known = " The model knows the time of the item that it ranks." if about.config["request_time"] else ""
    return f"## Metrics\n\n{protocol}{known}\n\n{lines}\n\n{note}"


def cells(about: Published, value) -> list[str]:
    return [value(split, metric) for metric in about.metrics for split in ("valid", "test")]


def own(score: float | None) -> str:
    return "not measured" if score is None else spread([score])


def over_seeds(records: list[dict], split: str, metric: str) -> str:
    found = [record[split][metric] for record in records if metric in record.get(split, {})]
    return spread(found) if len(found) == len(records) else ""


def data(about: Published) -> str:
    state = about.state
    counts = f"{state['vocabulary']['num_users']:,} users, {len(about.catalogue):,} items, "
    counts += f"{int(about.catalogue.counts.sum()):,} actions"
    text = f"## Data\n\n{about.data_name}: {counts}{dates(about)}."
    return f"{text}\n\n{MOVIELENS_TERMS}" if about.is_movielens else text


def dates(about: Published) -> str:
    """ ", 2000-04-25 to 2003-02-28", as far as it is known"""
    histories = about.path.parent / FILE
    times = read_histories(histories).timestamps if histories.is_file() else np.zeros(0)
    if len(times):
        return f", {day(times.min())} to {day(times.max())}"
    last = about.state.get("last_time")
    return "" if last is None else f", until {day(last)}"


def day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def training(about: Published) -> str:
    text = "## Training\n\n"
    if about.result is None:
        return text + "No record of the finished run lies beside the checkpoint."
    result = about.result
    minutes = f"{result['seconds'] / 60:.1f}"
    return f"""{text}```bash
{public_command(result)}
```
Commit {result["commit"]}, {result["date"][:10]}, {minutes} minutes on {result["machine"]};
{plural(result["num_processes"], "process")}; epoch {result["best_epoch"]} is the best on validation."""


def public_command(result: dict) -> str:
    """The command without where its files lie on the machine of the training."""
    _, *flags = shlex.split(result["command"])
    flags = [flag for flag in flags if not flag.startswith(("--out_dir", "--data_dir"))]
    count = result["num_processes"]
    start = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
    return shlex.join([*start.split(), "main.py", *map(without_folders, flags)])


def without_folders(flag: str) -> str:
    name, equals, value = flag.rpartition("=")
    parts = [PureWindowsPath(part) for part in value.split(",")]  # which splits at / and at \
    kept = [f"configs/{part.name}" if "configs" in part.parts[:-1] else part.name for part in parts]
    return f"{name}{equals}{','.join(kept)}"


def usage(about: Published) -> str:
    first = about.catalogue.ids[int(np.argmax(about.catalogue.counts))]
    code = f"""## Use

In a checkout of Toy-RecLM with `pip install -r requirements-serve.txt`:

```python
from reclm.serve import Recommender
from reclm.serve.hub import fetch
print(Recommender.load(fetch("{about.repo}")).recommend([{json.dumps(first, ensure_ascii=False)}], k=10))
```
```bash
python scripts/recommend.py --from_hub={about.repo} --history={shlex.quote(first)}
```"""
    reads = ["the ids of items, oldest first"]
    if "actions" in about.reads.codes:
        reads.append("a rating of each, if known")
    if about.reads.profile:
        reads.append(f"the person's {', '.join(about.reads.profile)}, as far as they are known")
    if about.reads.times:
        reads.append("the time of each, if known")
    if about.reads.request_time:
        reads.append("the time of the request")
    return f"""{code}

In: {"; ".join(reads)}. Out: the best items with their scores{scores(about)}"""


def scores(about: Published) -> str:
    if about.config["task"] == "ctr":
        return ", which are probabilities."
    return ", which can be compared within one list only."


def limits(about: Published) -> str:
    newest = int(about.catalogue.years.max(initial=0))
    dated = f"; the newest is of {newest}" if newest else ""
    lines = [
        f"It knows the items of its training data and no others{dated}.",
        "It prefers what many people chose: items with few actions are recommended rarely.",
    ]
    if about.is_movielens and about.config["task"] == "matching":
        lines.append("A rating counts as an action, whether the person liked the film or not.")
    lines += [
        "The metrics say how well it predicts what people did, not whether its lists are of use to them.",
        "It is not for decisions about people.",
    ]
    notes = (about.result or {}).get("notes", [])
    lines += [f"{note[:1].upper()}{note[1:]}." for note in notes if "/" not in note and "\\" not in note]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def files(about: Published) -> str:
    names = (hub.WEIGHTS, hub.ITEMS, hub.SETTINGS)
    rows = "\n".join(f"| {name} | `{hub.checksum(about.folder / name)}` |" for name in names)
    return f"## Files\n\n| file | sha256 |\n|---|---|\n{rows}\n\n{licence(about)}"


def licence(about: Published) -> str:
    if about.licence:
        return f"Licence of the weights: {about.licence}."
    terms = "; the terms of MovieLens apply" if about.is_movielens else ""
    return f"No licence was chosen for the weights{terms}."


# ---------------------------------------------------------------- records of the same settings


def best_record(about: Published) -> tuple[str, list[dict]]:
    """(name, one record per seed) of the runs with the settings of this one, of which most seeds are known;
    ("", []) where there are none."""
    if not about.is_whole:
        return "", []
    names = set(fixed_names(about.config, "model", "data", "trajectory")) - {"seed", "data_dir"}
    found = {
        name: records
        for name, records in read_records(RECORDS).items()
        if all(same_settings(record, about.config, names, "main.py") for record in records)
    }
    return max(found.items(), key=lambda item: len(item[1]), default=("", []))


def popularity(about: Published) -> list[dict]:
    """The record of counting on the same data and protocol, or nothing."""
    comparable = about.is_whole and about.config["filter_seen"] is not False
    if not comparable or about.config["task"] != "matching":
        return []
    names = set(fixed_names(about.config, "data")) - {"data_dir"}
    for name, records in read_records(RECORDS).items():
        if name.startswith("popularity") and same_settings(records[0], about.config, names, "baselines.py"):
            return records[:1]
    return []


def same_settings(record: dict, config: dict, names: set[str], program: str) -> bool:
    """Was the one command of a record `program` with these settings? Those that the data decide on (SETTLED)
    may be left open in the command."""
    command, *more = record.get("commands", [""])  # published results have none
    before, _, flags = command.partition(f"{program} ")
    if more or not flags and not command.endswith(program) or "ctr_baselines" in before:
        return False
    try:
        given = parse_args([flag.replace("configs/", f"{ROOT}/configs/") for flag in shlex.split(flags)])
        theirs = build_config(given).flat()
    except UserError:  # a setting of earlier versions
        return False
    theirs["dataset"] = theirs["dataset"] or "ml-1m"
    open_ones = {name for name in SETTLED if theirs[name] is None}
    return all(theirs[name] == config.get(name) for name in names - open_ones if name in theirs)
