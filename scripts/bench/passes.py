"""The parts of scripts/bench/serve.py that use a recommender in this process, on one thread."""

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import measure  # noqa: F401  puts the spine on sys.path
import numpy as np
import torch

from reclm.errors import UserError
from reclm.serve import Catalogue, Filters, Person, Recommender
from reclm.serve.about import About
from reclm.serve.person import Reads, make_batch
from reclm.serve.recommender import AT_ONCE
from reclm.serve.top_k import score_items, top_k

if TYPE_CHECKING:
    from serve import Bench

ADDITIONS = 1_000  # to sessions, per round
WHOLE_PASSES = 20  # beside them
MANY_ITEMS, DIM = 1_000_000, 64
REPEATS = 20  # of each piece of work on many items, per round
EXPLAINED = 100  # persons, per round
PAST = 50  # items of each that are tried
NEW = Filters(include_seen=False)


def run(command: list) -> str:
    """The standard output of a command. Raises UserError with the end of its error output if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed:\n{ran.stderr[-2000:]}")
    return ran.stdout


def milliseconds(work: Callable) -> float:
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def latency(taken: list[float], name: str = "") -> dict[str, float]:
    """Median and 99th percentile of milliseconds"""
    return {f"{name}{p}, ms": float(np.percentile(taken, int(p[1:]))) for p in ("p50", "p99")}


# ---------------------------------------------------------------- sessions


def session(bench: "Bench") -> dict:
    """ms to add an action and recommend ten items, and of recommending them from the whole history"""
    torch.set_num_threads(1)
    recommenders = {
        f"{size}, {runtime}": Recommender.load(path)
        for size, models in (("default", bench.models), ("large", bench.large))
        for runtime, path in models.items()
    }
    rounds = {name: [] for name in recommenders}
    for number in range(bench.args.rounds):
        for name, recommender in recommenders.items():
            rounds[name].append(session_costs(recommender, seed=number))
    return {"rounds": rounds}


def session_costs(recommender: Recommender, seed: int) -> dict[str, float]:
    """Of ADDITIONS to random histories of at least half of max_len items; the largest difference is between
    scores of all items in a session and in a pass of the whole history."""
    rng, half = np.random.default_rng(seed), recommender.reads.max_len // 2
    added, whole, differences, table = [], [], [], recommender.engine.table
    while len(added) < ADDITIONS:
        items = rng.integers(0, len(recommender.catalogue), 2 * half)
        ids = [recommender.catalogue.ids[item] for item in items]
        going_on = recommender.session(ids[:half])
        for item in ids[half : half + ADDITIONS - len(added)]:
            begin = time.perf_counter()
            going_on.add(item)
            going_on.recommend(10)
            added.append(1e3 * (time.perf_counter() - begin))
            if len(added) % max(1, ADDITIONS // WHOLE_PASSES) == 0:
                person = going_on.person
                whole.append(milliseconds(partial(recommender.recommend, person, 10)))
                hidden = recommender.engine.hidden(make_batch([person], recommender.reads))[0]
                differences.append(np.abs(table @ hidden - table @ going_on.hidden).max())
    difference = {"largest difference of scores": float(max(differences))}
    return latency(added) | latency(whole, "whole history ") | difference


def why(bench: "Bench") -> dict:
    """ms to explain ten recommendations by PAST items: all of a history, or the last of a longer one"""
    torch.set_num_threads(1)
    recommenders = {name: Recommender.load(path) for name, path in bench.models.items()}
    lengths = np.diff(bench.recommender.histories.offsets)
    users = np.flatnonzero(lengths >= min(PAST, lengths.max())).tolist()[:EXPLAINED]
    whole = [bench.recommender.user_at(user) for user in users]
    groups = {"": [person.keep(slice(-PAST, None)) for person in whole], ", longer history": whole}
    rounds = {name + group: [] for group in groups for name in recommenders}
    for _ in range(bench.args.rounds):
        for group, people in groups.items():
            for name, recommender in recommenders.items():
                times = [explaining(recommender, person) for person in people]
                rounds[name + group].append(latency(times))
    return {"rounds": rounds}


def explaining(recommender: Recommender, person: Person) -> float:
    items = [item.id for item in recommender.recommend(person, 10, NEW)]
    return milliseconds(lambda: recommender.why(person, items, last=PAST))


# ---------------------------------------------------------------- a million items


class Factors:
    """An engine without a model: a table of random item factors"""

    def __init__(self, num_items: int, dim: int):
        rng = np.random.default_rng(0)
        self.table = rng.standard_normal((num_items + 1, dim), dtype=np.float32) / np.float32(dim**0.5)
        self.user = rng.standard_normal((1, dim), dtype=np.float32)


def items(bench: "Bench") -> dict:
    """ms to score MANY_ITEMS for one user and choose ten as Recommender does, beside reading their factors"""
    engine = Factors(MANY_ITEMS, DIM)
    catalogue = Catalogue(range(MANY_ITEMS), (), (), np.zeros(0))
    about = About({"task": "matching"}, "random", "none", "never")
    reads = Reads(100, False, False, 0.0, {}, {}, False)
    recommender = Recommender(engine, catalogue, reads, about)
    person, scores = Person(np.arange(1, 101)), engine.user @ engine.table.T
    flat = engine.table.ravel()
    works = {
        "sum": lambda: flat.sum(),
        "dot": lambda: flat @ flat,
        "scores": lambda: score_items(engine.user, engine.table),
        "scores by BLAS": lambda: engine.table @ engine.user[0],
        "top k": lambda: top_k(scores, 10),
        "all": lambda: recommender.best_of(engine.user, [person], 10, NEW),
    }
    rows = []
    for _ in range(bench.args.rounds):
        medians = [1e3 * taken for taken in measure.seconds(works.values(), REPEATS)]
        row = dict(zip(works, medians, strict=True))
        row = {"reading, ms": min(row.pop("sum"), row.pop("dot"))} | {f"{k}, ms": v for k, v in row.items()}
        rows.append(row | {"all / reading": row["all, ms"] / row["reading, ms"]})
    return {"rounds": {f"{MANY_ITEMS:,} items": rows}}


# ---------------------------------------------------------------- quality of exports


def export(bench: "Bench") -> dict:
    """Of the checkpoint and its exports: bytes, NDCG@10 of each user's last item, and how the ten best items
    and the scores differ from those of the checkpoint. Not a matter of time: one round."""
    torch.set_num_threads(1)
    paths = {"checkpoint": bench.model, "float32": bench.models["exported"]}
    paths["int8"] = bench.export("int8", bench.model, "--quantize=int8")
    recommenders = {name: Recommender.load(path) for name, path in paths.items()}
    known = bench.recommender.histories
    users = np.flatnonzero(np.diff(known.offsets) > 1).tolist()
    parts = [users[i : i + AT_ONCE] for i in range(0, len(users), AT_ONCE)]
    rows = {name: [] for name in recommenders}
    for part in parts:
        whole = [bench.recommender.user_at(user) for user in part]
        people = [person.keep(slice(0, -1)) for person in whole]
        targets = [person.items[-1] for person in whole]
        of_checkpoint = None
        for name, recommender in recommenders.items():
            batch = make_batch(people, recommender.reads)
            hidden = recommender.engine.hidden(batch)
            scores = hidden @ recommender.engine.table.T
            best = [found for found, _ in recommender.best_of(hidden, people, 10, NEW)]
            of_checkpoint = of_checkpoint or (scores, best)
            rows[name].append(differences(scores, best, targets, *of_checkpoint))
    return {"rounds": {name: [joined(found, paths[name])] for name, found in rows.items()}}


def differences(
    scores: np.ndarray,
    best: list[np.ndarray],
    targets: list[int],
    other_scores: np.ndarray,
    other_best: list[np.ndarray],
) -> dict[str, list[float]]:
    """Per user, of scores (B, V), the ten best items and the item to find, against another model's"""
    places = [np.flatnonzero(row == target) for row, target in zip(best, targets, strict=True)]
    pairs = list(zip(best, other_best, strict=True))
    return {
        "NDCG@10": [1 / np.log2(2 + place[0]) if len(place) else 0.0 for place in places],
        "same order": [float(np.array_equal(one, other)) for one, other in pairs],
        "overlap": [len(np.intersect1d(one, other)) / max(1, len(other)) for one, other in pairs],
        "difference": np.abs(scores - other_scores)[:, 1:].max(1).tolist(),
    }


def joined(rows: list[dict[str, list[float]]], path: Path) -> dict[str, float]:
    """`differences` of all batches -> the figures of a model, with the bytes of its file or folder"""
    found = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    files = list(path.iterdir()) if path.is_dir() else [path]
    graph = path / "model.onnx" if path.is_dir() else path
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "bytes of the model": graph.stat().st_size,
        "users": len(found["NDCG@10"]),
        "NDCG@10": float(found["NDCG@10"].mean()),
        "users with the same ten in the same order": float(found["same order"].sum()),
        "overlap of the ten": float(found["overlap"].mean()),
        "largest difference of scores": float(found["difference"].max()),
    }
