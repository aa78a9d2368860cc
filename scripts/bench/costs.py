"""Profile a training step: time per phase, distance from the machine's limit, memory, and growth with size.

    pip install -r requirements-dev.txt
    python scripts/bench/costs.py --out=costs.json --plot=costs.png

phases      milliseconds per phase of a step
operators   share of each kind of work in a step, and the machine's limit, its matrix products alone
memory      peak MiB of a softmax loss with its gradients, in chunks and with all logits at once
blocks      milliseconds and peak MiB of one block over 12,000 tokens, forward and backward
growth      milliseconds per step by length, width, depth and catalogue; seconds to rank users
launches    trained tokens/s of one and two processes, and a large catalogue, started as in peers.py

Sequences are synthetic, so nothing is downloaded. All parts but launches run in this process, or a child of
it, on the CPU; --threads=1 is what a process of torchrun has. For the limit, each matrix product that the
profiler records is timed again as a plain torch.mm (torch.bmm for attention, of which a causal kernel needs
half) of the same shapes. Peak memory is read from /proc: Linux only.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib.pyplot as plt
import measure  # before torch
import numpy as np
import peers
import torch
import torch.nn.functional as F
from measure import seconds, show
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import main as program
from evaluate import evaluate
from model import SequenceRecommender
from reclm.config import Config, LossConfig, ModelConfig, build_config
from reclm.data.dataset import Dataset, Vocabulary
from reclm.errors import run_script
from reclm.nn import hstu
from reclm.nn.losses import softmax
from reclm.run.process import keep_freed_memory

ML_1M = {"users": 6040, "items": 3416, "length": 165}  # about the size of MovieLens-1M
# The share of each of two processes in a batch of 128.
HALF = {
    "optimizer": "adamw",
    "loss": "softmax",
    "exclude_history": False,
    "batch_size": 64,
    "lr": 1e-3,
    "device": "cpu",
}
KINDS = {  # kind of work: parts of operator names; the first kind that matches counts
    "matrix products": ["mm"],
    "attention": ["attention"],
    "softmax": ["exp", "amax", "log"],
    "dropout": ["random"],
    "SwiGLU": ["silu"],
    "optimizer": ["Optimizer", "adamw"],
}
LOSS_SIZES = [(3_200, 3_416), (12_800, 3_416), (51_200, 3_416), (3_200, 50_000), (12_800, 50_000)]


def made_up(users: int, items: int, length: int) -> Dataset:
    """Synthetic sequences of `length` +- 50 % each; every item occurs if there are enough rows."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(3, length // 2), 3 * length // 2 + 1, users)
    rows = lengths.sum()
    item_ids = np.concatenate([rng.permutation(items)[:rows], rng.integers(0, items, max(0, rows - items))])
    none = np.zeros(0)
    actions = {"item_ids": rng.permutation(item_ids) + 1, "timestamps": none, "ratings": none}
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = {"users": np.arange(users), "items": np.arange(items)}
    return Dataset("made-up", "none", notes=[], fingerprint="", offsets=offsets, **actions, **ids)


def new_run(cfg: Config, dataset: Dataset) -> program.Run:
    """A run with a fresh model in training mode."""
    layout = program.lay_out(cfg)
    run = program.Run(cfg, dataset, program.build_model(cfg, dataset, layout), layout)
    run.model.train()
    return run


def half_run(dataset: Dataset, **given) -> program.Run:
    """A run with the settings HALF, updated by `given`."""
    return new_run(build_config(HALF | given), dataset)


def step(run: program.Run, batch: tuple) -> None:
    """One optimizer step on a batch of TrainBatches."""
    _, micro_batches, num_targets = batch
    gradients = partial(program.compute_gradients, run, 0, 0, micro_batches, num_targets)
    gradients()
    run.engine.clip()
    run.engine.step(gradients, num_targets)


def phases(run: program.Run, steps: int = 24) -> dict:
    """{"tokens_per_s", "ms": {phase: milliseconds per step}}, averaged over the first `steps` batches."""
    model, total = run.model, defaultdict(float)
    for count in (2, steps):  # a warm-up of two steps, not counted
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
            lap("loss and its gradient")  # one pass computes both
            (loss / num_targets).backward()
            lap("blocks, backward")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.optimizer.step()
            lap("optimizer")
            tokens += num_targets
    rate = tokens / sum(total.values())
    return {"tokens_per_s": rate, "ms": {name: 1e3 * value / steps for name, value in total.items()}}


def operators(run: program.Run, steps: int = 5) -> dict:
    """Shares of a step by kind of work, its milliseconds and GFLOP/s, and its efficiency: the time of its
    matrix products alone, divided by the time of the step."""
    batch = max(run.batches.epoch(0), key=lambda batch: batch[2])  # the same in all steps, so no new memory
    [plain] = seconds([lambda: step(run, batch)], 2 * steps)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            step(run, batch)
    shares, limit, flops = defaultdict(float), 0.0, 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        kinds = (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
        shares[next(kinds, "other elementwise work")] += event.self_cpu_time_total
        for left, right, times in matrix_products(event.key, event.input_shapes):
            left, right = torch.randn(left), torch.randn(right)
            out = left @ right
            [taken] = seconds([partial(torch.matmul, left, right, out=out)])
            limit += event.count / steps * times * taken
            flops += event.count / steps * times * 2 * out.numel() * left.shape[-1]
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


def matrix_products(name: str, shapes: list) -> list[tuple[list, list, float]]:
    """The matrix products of a profiled operator: (shape of the left factor, of the right, times needed)."""
    if name in ("aten::mm", "aten::bmm"):
        return [(*shapes[:2], 1)]
    if name in ("aten::addmm", "aten::addmm_"):
        return [(*shapes[1:3], 1)]
    if name.startswith("aten::_scaled_dot_product_flash_attention"):
        *heads, length, width = shapes[0]
        tall, flat, square = [*heads, length, width], [*heads, width, length], [*heads, length, length]
        # Causal, so half of each. Forward: QK', PV. Backward: QK' again, dO V', P'dO, dS K, dS'Q.
        of_scores, of_values = (1.0, 1.5) if name.endswith("backward") else (0.5, 0.5)
        return [(tall, flat, of_scores), (square, tall, of_values)]
    return []


def growth() -> dict:
    """{quantity: {value: milliseconds per step, or seconds}}; the other sizes are near MovieLens-1M's."""
    lengths, catalogues = (50, 100, 200, 400, 1000), (3_000, 30_000, 100_000)
    cases = {  # quantity: {value: (size of the data, settings)}
        "T (12,800 tokens per step)": {
            t: ({"users": 1024, "length": 2 * t + 4}, {"max_len": t, "batch_size": 12_800 // t})
            for t in lengths
        },
        "D": {dim: ({}, {"dim": dim}) for dim in (32, 64, 128, 256)},
        "layers": {layers: ({}, {"n_layers": layers}) for layers in (1, 2, 4, 8)},
        "items V, softmax": {items: ({"items": items}, {}) for items in catalogues},
        "items V, sampled softmax": {
            items: ({"items": items}, {"loss": "sampled_softmax"}) for items in (*catalogues, 1_000_000)
        },
    }
    found = {
        name: {value: step_ms(size, given) for value, (size, given) in values.items()}
        for name, values in cases.items()
    }
    found["users, ranking them all (s)"] = {
        users: ranking_seconds(users) for users in (1_000, 10_000, 100_000)
    }
    return found


def step_ms(size: dict, given: dict) -> float:
    """Milliseconds per training step on synthetic data of this size, with these settings."""
    small = ML_1M | {"users": 512, "length": 400}  # (nearly) all sequences fill max_len
    run = half_run(made_up(**small | size), **given)
    batches = cycle(islice(run.batches.epoch(0), 2))
    [taken] = seconds([lambda: step(run, next(batches))], 3)
    return 1e3 * taken


def ranking_seconds(users: int) -> float:
    """Seconds to rank all items for `users` users with short histories."""
    run = half_run(made_up(users, 3_416, 20))
    begin = time.perf_counter()
    evaluate(run.model, run.dataset, "test", run.cfg.eval)
    return time.perf_counter() - begin


def alone(work: Callable, *inputs):
    """work(*inputs) in a new process, so that peak memory is that of the work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, inputs)


def whole_softmax(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The sum of the softmax loss, computed with all logits at once."""
    return F.cross_entropy(hidden @ table[1:].T, targets - 1, reduction="sum")


def peak_of_loss(loss: Callable, positions: int, items: int) -> float:
    """Peak MiB of a softmax loss and its gradients, at width 64."""
    hidden = torch.randn(positions, 64, requires_grad=True)
    table = torch.randn(items + 1, 64, requires_grad=True)
    targets = torch.randint(1, items + 1, (positions,))
    loss(hidden[:300], table[:300], targets[:300] % 299 + 1).backward()  # warm up: loads code
    hidden.grad = table.grad = None
    before = measure.own_peak()
    loss(hidden, table, targets).backward()
    return measure.own_peak() - before


def memory() -> list[dict]:
    """Peak MiB of both softmax losses, one row per size of LOSS_SIZES."""
    return [
        {
            "positions": positions,
            "items": items,
            "chunked_mib": alone(peak_of_loss, softmax, positions, items),
            "materialised_mib": alone(peak_of_loss, whole_softmax, positions, items),
        }
        for positions, items in LOSS_SIZES
    ]


def block_costs() -> list[dict]:
    """Costs of both kinds of block, and of HSTU with all scores at once, one row per length and kind."""
    rows = []
    for length in (200, 1000, 4000):
        for kind in ("llama", "hstu", "hstu, all scores at once"):
            milliseconds, mib = alone(cost_of_block, kind, length)
            rows.append({"block": kind, "T": length, "ms": milliseconds, "mib": mib})
    return rows


def cost_of_block(kind: str, length: int) -> tuple[float, float]:
    """(milliseconds, peak MiB) of one block over 12,000 tokens, forward and backward."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if "at once" in kind:
        hstu.ROWS = hstu.SCORES = hstu.KEPT_SCORES = sys.maxsize
    shape = (12_000 // length, length)
    times = torch.arange(length).expand(shape).double() * 3600
    batch = {"item_ids": torch.randint(1, 1000, shape), "timestamps": times}
    cfg = ModelConfig(model_name=kind.split(",")[0], max_len=length, n_layers=1)
    model = SequenceRecommender(cfg, LossConfig(), Vocabulary(1000, 1))
    before = measure.own_peak()
    [taken] = seconds([lambda: model.encode(batch).sum().backward()], 3)
    return 1e3 * taken, measure.own_peak() - before


def launches(items: int) -> dict:
    """Two processes against one, and a catalogue of `items` items, launched as in peers.py."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        usual, large = work / "usual.csv", work / "large.csv"
        for path, size in ((usual, ML_1M), (large, ML_1M | {"items": items})):
            dataset = made_up(**size)
            measure.write_csv(path, dataset.owner, dataset.item_ids, dataset.place)
        rates = {1: [], 2: []}
        for _ in range(3):
            for ranks, values in rates.items():
                row = peers.run_tool("ours", {}, {"csv": str(usual), "ranks": ranks}, work)
                values.append(row["targets"] / row["train_seconds"])
        row = peers.run_tool("ours", {}, {"csv": str(large), "loss": "sampled_softmax"}, work)
    row |= {"items": items, "step_seconds": row["train_seconds"] / row["steps"]}
    row |= {"users_per_s": row["eval_users"] / row["eval_seconds"]}
    return {
        "2 ranks x 1 thread / 1 rank x 2 threads": statistics.median(rates[2]) / statistics.median(rates[1]),
        "ranks": [{"ranks": ranks, "tokens/s": values} for ranks, values in rates.items()],
        "large": row,
    }


def plot(costs: dict, path: Path) -> None:
    """Write a figure to `path`: phases and kinds of work as bars, and the growth of a step as lines."""
    figure, (*bars, lines) = plt.subplots(1, 3, figsize=(17, 4.2), layout="constrained")
    shares = {name: 100 * share for name, share in costs["operators"]["shares"].items()}
    parts = {"a step by phase, ms": costs["phases"]["ms"], "a step by kind of work, %": shares}
    for axis, (title, values) in zip(bars, parts.items(), strict=True):
        axis.bar_label(axis.barh(list(values), list(values.values())), fmt="%.1f", padding=3)
        axis.set(title=title, xmargin=0.15)
        axis.invert_yaxis()
    for name, values in costs["growth"].items():
        if "users" not in name:
            first = next(iter(values))
            x, y = [value / first for value in values], [ms / values[first] for ms in values.values()]
            lines.plot(x, y, "o-", label=f"{name}, from {first:,}")
    lines.set(xscale="log", yscale="log", xlabel="times as large", title="a step, times as long")
    lines.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = measure.arguments(__doc__, "costs.json")
    parser.add_argument("--plot", type=measure.new_file, default="costs.png", help="figure; must not exist")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch [default: %(default)s]")
    parser.add_argument(
        "--items", type=int, default=1_000_000, help="items of the large catalogue [default: 1,000,000]"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    run = half_run(made_up(**ML_1M))
    parts = {
        "phases": lambda: phases(run),
        "operators": lambda: operators(run),
        "memory": memory,
        "blocks": block_costs,
        "growth": growth,
        "launches": lambda: launches(args.items),
    }
    costs = {"threads": args.threads}
    for name, work in parts.items():
        costs[name] = work()
        show(name, costs[name])
    measure.write(args.out, costs)
    plot(costs, args.plot)


if __name__ == "__main__":
    run_script(main)
