"""Where the time of a training step goes, how far it is from the machine's limit, and how costs grow.

    pip install -r requirements-dev.txt
    python scripts/costs.py --out=costs.json --plot=costs.png

One process on made-up sequences, so nothing is downloaded; `--threads=1` is what a rank of torchrun has.
The limit of a step is the time of its matrix products alone: each product that the profiler saw is timed
again as a plain torch.mm (torch.bmm for attention, of which a causal kernel needs half) of the same shapes.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the spine

import bench
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import main as program
from evaluate import evaluate
from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, build_config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.nn import hstu
from reclm.nn.losses import softmax
from reclm.run import dist

ML_1M = {"users": 6040, "items": 3416, "length": 165}  # the size of MovieLens-1M
RANK = {
    "loss": "softmax",
    "batch_size": 64,
    "lr": 1e-3,
    "device": "cpu",
    "exclude_history": False,
}  # half of 128
KINDS = {  # part of an operator's name: what it is work for; the first that fits
    "mm": "matrix products", "attention": "attention", "exp": "softmax", "amax": "softmax", "log": "softmax",
    "random": "dropout", "silu": "SwiGLU", "Optimizer": "optimizer", "adamw": "optimizer",
}  # fmt: skip


def made_up(users: int, items: int, length: int, seed: int = 0) -> Dataset:
    """Sequences of `length` +- half of it over a catalogue in which every item occurs where there is room."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(3, length // 2), 3 * length // 2 + 1, users)
    rows = lengths.sum()
    item_ids = np.concatenate([rng.permutation(items)[:rows], rng.integers(0, items, max(0, rows - items))])
    none = np.zeros(0)
    return Dataset(
        name="made-up", protocol="none", notes=[], fingerprint="", timestamps=none, ratings=none,
        offsets=np.concatenate([[0], np.cumsum(lengths)]), item_ids=rng.permutation(item_ids) + 1,
        users=np.arange(users), items=np.arange(items),
    )  # fmt: skip


def trainer(dataset: Dataset, **said) -> program.Run:
    run = program.Run(build_config(RANK | said), dataset, None, None)
    run.model.train()
    return run


def seconds(work: Callable, repeats: int = 5) -> float:
    """Median time of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def step(run: program.Run, batch: tuple) -> None:
    """One optimizer step on a batch of TrainBatches."""
    _, micro_batches, num_targets = batch
    program.accumulate_gradients(run, micro_batches, num_targets)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()


def phases(run: program.Run, steps: int = 24) -> dict:
    """Milliseconds of each phase of a step, over the first batches of an epoch."""
    model, total = run.model, defaultdict(float)
    for count in (2, steps):  # the first two are not counted
        total.clear()
        tokens, mark = 0, time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal mark
            total[phase] += time.perf_counter() - mark
            mark = time.perf_counter()

        for _, (batch,), num_targets in islice(run.batches.epoch(0), count):
            lap("data")
            run.optimizer.zero_grad()
            hidden = model.encode(batch)
            lap("blocks, forward")
            real = batch["targets"] != 0
            loss = softmax(hidden[real], model.item_table(), batch["targets"][real])
            lap("loss and its gradient")  # both in one pass
            (loss / num_targets).backward()
            lap("blocks, backward")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            lap("optimizer")
            tokens += num_targets
    rate = tokens / sum(total.values())
    return {"tokens_per_s": rate, "ms": {name: 1e3 * value / steps for name, value in total.items()}}


def operators(run: program.Run, steps: int = 5) -> dict:
    """Shares of a step by kind of work, and its efficiency: time of its plain matrix products / its time."""
    batch = max(run.batches.epoch(0), key=lambda batch: batch[2])  # the same in all steps: no new memory
    plain = seconds(lambda: step(run, batch), 2 * steps)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            step(run, batch)
    shares, limit, flops = defaultdict(float), 0.0, 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "other elementwise work")
        shares[kind] += event.self_cpu_time_total
        for product, times in matrix_products(event.key, event.input_shapes):
            limit += event.count / steps * times * seconds(product.run)
            flops += event.count / steps * times * product.flops
    total = sum(shares.values())
    return {
        "shares": {kind: value / total for kind, value in sorted(shares.items(), key=lambda x: -x[1])},
        "tokens": batch[2],
        "step_ms": 1e3 * plain,
        "limit_ms": 1e3 * limit,
        "step_gflops": flops / plain / 1e9,
        "limit_gflops": flops / limit / 1e9,
        "efficiency": limit / plain,
    }


class Product:
    """A plain (batched) matrix product of given shapes, with a place for its result."""

    def __init__(self, left: tuple, right: tuple):
        self.left, self.right = torch.randn(left), torch.randn(right)
        self.out = self.left @ self.right
        self.flops = 2 * self.out.numel() * left[-1]

    def run(self) -> None:
        torch.matmul(self.left, self.right, out=self.out)


def matrix_products(name: str, shapes: list) -> list[tuple[Product, float]]:
    """The products inside an operator of the profile, each with how often it is needed."""
    if name in ("aten::mm", "aten::bmm"):
        return [(Product(*shapes[:2]), 1)]
    if name in ("aten::addmm", "aten::addmm_"):
        return [(Product(*shapes[1:3]), 1)]
    if name.startswith("aten::_scaled_dot_product_flash_attention"):
        *heads, length, width = shapes[0]
        backward = name.endswith("backward")
        scores = Product((*heads, length, width), (*heads, width, length))
        values = Product((*heads, length, length), (*heads, length, width))
        # Causal: half. Forward QK' and PV; backward again QK', dO V', and P'dO, dS K, dS'Q.
        return [(scores, 1.0 if backward else 0.5), (values, 1.5 if backward else 0.5)]
    return []


def growth() -> dict:
    """{what grows: {value: milliseconds of a step, or users/s}}; all else as in MovieLens-1M."""
    small = ML_1M | {"users": 512, "length": 400}  # every sequence longer than max_len
    steps = {
        "T (12,800 tokens a step)": {
            length: (
                small | {"users": 1024, "length": 2 * length + 4},
                {"max_len": length, "batch_size": 12_800 // length},
            )
            for length in (50, 100, 200, 400, 1000)
        },
        "D": {dim: (small, {"dim": dim}) for dim in (32, 64, 128, 256)},
        "layers": {layers: (small, {"n_layers": layers}) for layers in (1, 2, 4, 8)},
        "items V, softmax": {items: (small | {"items": items}, {}) for items in (3_000, 30_000, 100_000)},
        "items V, sampled softmax": {
            items: (small | {"items": items}, {"loss": "sampled_softmax"})
            for items in (3_000, 30_000, 100_000, 1_000_000)
        },
    }  # fmt: skip
    result = {}
    for name, cases in steps.items():
        result[name] = {}
        for value, (size, said) in cases.items():
            run = trainer(made_up(**size), **said)
            batches = cycle(islice(run.batches.epoch(0), 2))
            result[name][value] = 1e3 * seconds(lambda run=run, batches=batches: step(run, next(batches)), 3)
            say(f"{name} = {value:,}: {result[name][value]:,.0f} ms a step")
    result["users, ranking them all (s)"] = {}
    for users in (1_000, 10_000, 100_000):
        run = trainer(made_up(users, 3_416, 20))
        begin = time.perf_counter()
        evaluate(run.model, run.dataset, "test", run.cfg.eval)
        result["users, ranking them all (s)"][users] = time.perf_counter() - begin
        say(f"ranking {users:,} users with 20 items: {time.perf_counter() - begin:.1f} s")
    return result


def rounded(values: dict, digits: int = 1) -> str:
    """A nested dict of numbers, to be read."""
    parts = (
        f"{name}: ({rounded(value, digits)})"
        if isinstance(value, dict)
        else f"{name}: {round(value, digits)}"
        for name, value in values.items()
    )
    return ", ".join(parts)


def say(text: str) -> None:
    print(text, flush=True)


def alone(work: Callable, *inputs):
    """work(*inputs) in a process of its own, whose peak of memory is that of the work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, inputs)


def softmax_memory(kind: str, positions: int, items: int) -> float:
    """Peak MiB that a softmax loss and its gradients take."""
    return alone(peak_of_loss, kind, positions, items)


def peak_of_loss(kind: str, positions: int, items: int) -> float:
    hidden = torch.randn(positions, 64, requires_grad=True)
    table = torch.randn(items + 1, 64, requires_grad=True)
    targets = torch.randint(1, items + 1, (positions,))
    materialised_or_chunked(kind, hidden[:300], table[:300], targets[:300] % 299 + 1).backward()  # load code
    hidden.grad = table.grad = None
    before = peak_resident()
    materialised_or_chunked(kind, hidden, table, targets).backward()
    return peak_resident() - before


def peak_resident() -> float:
    """MiB, of this process alone: getrusage would start from the peak of its parent."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def materialised_or_chunked(kind: str, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    if kind == "chunked":
        return softmax(hidden, table, targets)
    return F.cross_entropy(hidden @ table[1:].T, targets - 1, reduction="sum")


def memory() -> list[dict]:
    rows = []
    for positions, items in (
        (3_200, 3_416),
        (12_800, 3_416),
        (51_200, 3_416),
        (3_200, 50_000),
        (12_800, 50_000),
    ):
        chunked, whole = (softmax_memory(kind, positions, items) for kind in ("chunked", "materialised"))
        rows.append(
            {"positions": positions, "items": items, "chunked_mib": chunked, "materialised_mib": whole}
        )
        say(f"loss of {positions:,} x {items:,} scores, MiB: chunked {chunked:.0f}, all at once {whole:.0f}")
    return rows


def block_costs() -> list[dict]:
    """Forward and backward of one block over 12,000 tokens, by length: both kinds, and HSTU all at once."""
    rows = []
    for length in (200, 1000, 4000):
        for kind in ("llama", "hstu", "hstu, all scores at once"):
            milliseconds, mib = alone(cost_of_block, kind, length)
            rows.append({"block": kind, "T": length, "ms": milliseconds, "mib": mib})
            say(f"{kind}, T = {length:,}: {milliseconds:.0f} ms, {mib:,.0f} MiB")
    return rows


def cost_of_block(kind: str, length: int) -> tuple[float, float]:
    """(milliseconds, peak MiB)"""
    torch.set_num_threads(1)
    dist.keep_freed_memory()
    if "at once" in kind:
        hstu.ROWS = hstu.SCORES = hstu.KEPT_SCORES = sys.maxsize
    shape = (12_000 // length, length)
    times = torch.arange(length).expand(shape).double() * 3600
    batch = {"item_ids": torch.randint(1, 1000, shape), "timestamps": times}
    cfg = ModelConfig(model_name=kind.split(",")[0], max_len=length, n_layers=1)
    model = SequenceRecommender(cfg, LossConfig(), Vocabulary(1000, 1))
    before = peak_resident()
    milliseconds = 1e3 * seconds(lambda: model.encode(batch).sum().backward(), 3)
    return milliseconds, peak_resident() - before


def launches(items: int) -> dict:
    """In processes of their own, as bench.py starts them: 2 ranks against 1, and a large catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        usual, large = work / "usual.csv", work / "large.csv"
        write_csv(usual, made_up(**ML_1M))
        write_csv(large, made_up(**ML_1M | {"items": items}))
        rates = {1: [], 2: []}
        for _ in range(3):
            for ranks, values in rates.items():
                row = bench.measure("ours", {}, {"csv": str(usual), "ranks": ranks}, work)
                values.append(row["targets"] / row["train_seconds"])
        ratio = statistics.median(rates[2]) / statistics.median(rates[1])
        say(f"2 ranks x 1 thread / 1 rank x 2 threads: {ratio:.2f}")
        row = bench.measure("ours", {}, {"csv": str(large), "loss": "sampled_softmax"}, work)
    row |= {"items": items, "step_seconds": row["train_seconds"] / row["steps"]}
    row["users_per_s"] = row["eval_users"] / row["eval_seconds"]
    say(
        f"{items:,} items: {row['step_seconds']:.2f} s a step, {row['users_per_s']:.0f} users/s ranked, "
        f"{row['peak_memory_gib']:.1f} GiB"
    )
    return {"tokens_per_s": {f"{ranks} rank(s)": values for ranks, values in rates.items()}, "large": row}


def write_csv(path: Path, dataset: Dataset) -> None:
    users = np.repeat(dataset.users, dataset.lengths)
    rows = np.stack([users, dataset.item_ids, np.arange(len(users))], axis=1)
    np.savetxt(path, rows, "%d", ",", header="user,item,timestamp", comments="")


def plot(costs: dict, path: str) -> None:
    """One picture: the phases and kinds of work as bars, and how a step grows."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.2), layout="constrained")
    phases, work = costs["phases"]["ms"], costs["operators"]
    bars(axes[0], phases, f"a step by phase, ms ({costs['phases']['tokens_per_s']:,.0f} tokens/s)", "{:.0f}")
    shares = {name: 100 * share for name, share in work["shares"].items()}
    bars(
        axes[1],
        shares,
        f"a step by kind of work, % ({100 * work['efficiency']:.0f} % of the limit)",
        "{:.1f}",
    )
    for name, values in costs["growth"].items():
        if "users" not in name:
            first = next(iter(values))
            x = [value / first for value in values]
            axes[2].plot(
                x, [y / values[first] for y in values.values()], "o-", label=f"{name}, from {first:,}"
            )
    axes[2].set(xscale="log", yscale="log", xlabel="times as large", title="a step, times as long")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def bars(axis, values: dict, title: str, form: str) -> None:
    drawn = axis.barh(list(values), list(values.values()))
    axis.bar_label(drawn, [form.format(value) for value in values.values()], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="costs.json")
    parser.add_argument("--plot", default="costs.png")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--items", type=int, default=1_000_000, help="of the large catalogue")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.keep_freed_memory()
    run = trainer(made_up(**ML_1M))
    costs = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": runs.commit()}
    costs |= {"machine": runs.machine(), "threads": args.threads}
    costs["phases"] = phases(run)
    say(f"{costs['phases']['tokens_per_s']:,.0f} tokens/s; ms a step: {rounded(costs['phases']['ms'])}")
    costs["operators"] = operators(run)
    say(f"by kind of work: {rounded(costs['operators'], 3)}")
    costs["memory"] = memory()
    costs["blocks"] = block_costs()
    costs["growth"] = growth()
    costs["launches"] = launches(args.items)
    Path(args.out).write_text(json.dumps(costs, indent=1))
    plot(costs, args.plot)
    say(f"written to {args.out} and {args.plot}")


if __name__ == "__main__":
    main()
