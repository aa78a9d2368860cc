"""Train and evaluate a sequential recommender.

    torchrun --standalone --nproc_per_node=2 main.py --eval_only=false
    torchrun --standalone --nproc_per_node=2 main.py --eval_only=true --ckpt_name='epoch_15.pth'
    python main.py --config=configs/sasrec.yaml --seed=1     # one process, a recipe, one setting changed
    python main.py --help                                    # all flags

Reading order: this file, model.py, data.py, evaluate.py; then reclm/ as needed.
"""

import os

# Let idle OpenMP threads sleep: spinning, they halve the speed of processes that share cores. OpenMP reads
# this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves it out

import math
import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from data import TrainBatches, load_dataset
from evaluate import evaluate
from model import BLOCKS, FORWARD, SequenceRecommender
from reclm.adapt import lora
from reclm.adapt.qat import train_for
from reclm.adapt.quantize import num_bytes, quantize_model
from reclm.config import Config, build_config
from reclm.data.dataset import Dataset
from reclm.data.features import choose_inputs
from reclm.data.repeats import settle_history
from reclm.errors import choose
from reclm.flags import parse_args
from reclm.metrics import choosing_metric
from reclm.nn.dealt import DealtEmbedding
from reclm.nn.layers import ItemEmbedding
from reclm.nn.losses import LOSSES
from reclm.nn.pq import assign_codes
from reclm.run import checkpoint, dist, folder, init_from, optim, report
from reclm.run.background import Background
from reclm.run.describe import describe_cost, describe_histories
from reclm.run.engines import build_engine, lay_out
from reclm.run.layout import Layout
from reclm.run.logger import Logger, say, write_json
from reclm.run.process import StopRequest, check_memory, memory_of_step
from reclm.serve import hub

# Settings whose value is a key of one of these dicts: to add a loss or a block, add an entry there.
NAMES = {"task": FORWARD, "model_name": BLOCKS, "loss": LOSSES, "optimizer": optim.OPTIMIZERS}


def main() -> None:
    with dist.distributed():
        given = parse_args()
        if given.get("describe"):
            describe(given)
        elif given.get("eval_only"):
            evaluate_checkpoint(given)
        else:
            train(given)


def evaluate_checkpoint(given: dict) -> None:
    """--eval_only=true: print the validation and test metrics of a checkpoint and write them to
    eval-<checkpoint>.json. Raises UserError without a usable checkpoint."""
    out_dir, path = hub.find_model(given)
    cfg, dataset, model = open_checkpoint(given, path)
    if path.parent == out_dir:
        folder.keep_histories(out_dir, dataset)
    result = report.describe_run(cfg, dataset) | {"checkpoint": str(path), "config": cfg.flat()}
    result |= {"quantize": cfg.run.quantize, "bytes": num_bytes(model)}
    for split in ("valid", "test"):
        result[split] = evaluate(model, dataset, split, cfg.eval)
        title = f"{split.upper()} of {path}{report.describe_rounding(cfg.run.quantize, cfg.train.qat)}"
        say(report.format_metrics(title, result[split], cfg))
    target = dist.on_main(lambda: folder.evaluation_file(out_dir, path, result))
    write_json(target, result)
    say(f"written to {target}")


def open_checkpoint(given: dict, path: Path) -> tuple[Config, Dataset, nn.Module]:
    """The config (of the checkpoint, overridden by the user's flags), dataset and trained model of a
    checkpoint. Raises UserError where a flag contradicts it or the data differ."""
    state = dist.from_main(lambda: hub.load_state(path))
    cfg = build_config(checkpoint.merge_config(given, state, path, "model", "data"))
    layout = lay_out(cfg)
    dataset = open_dataset(cfg, state)
    model = build_model(cfg, dataset, layout)
    checkpoint.restore_model(model, state, path, dataset)
    return cfg, dataset, quantize_model(model, cfg.run.quantize)


def open_dataset(cfg: Config, state: dict | None = None) -> Dataset:
    """The dataset with all inputs that the config asks for; with the `state` of a checkpoint, what its model
    knows of it. Settings left to the data are settled. Raises UserError for an unknown task, block, loss or
    optimizer, and where the data lack an input."""
    for setting, known in NAMES.items():  # before a download that may take minutes
        choose(setting, cfg.flat()[setting], known)
    dataset = choose_inputs(checkpoint.known_part(load_dataset(cfg.data, cfg.model.task), state, cfg), cfg)
    settle_history(cfg, dataset)
    say(report.describe_data(dataset))
    return dataset


def build_model(cfg: Config, dataset: Dataset, layout: Layout | None = None) -> nn.Module:
    """A model with initial weights, on this process's device. Raises UserError without that device."""
    check_memory(cfg, dataset.vocabulary)
    torch.manual_seed(cfg.train.seed)  # the same initial weights in every process
    items = ItemEmbedding
    if cfg.processes.deal_items:
        sparse = cfg.train.table_optimizer != "same"
        items = partial(DealtEmbedding, exchange=layout.exchange, sparse=sparse)
    model = SequenceRecommender(cfg.model, cfg.loss, dataset.vocabulary, items)
    return model.to(dist.pick_device(cfg.run.device))


class Run:
    """The objects that one training run shares between the functions below."""

    def __init__(
        self,
        cfg: Config,
        dataset: Dataset,
        model: nn.Module,
        layout: Layout | None = None,
        state: dict | None = None,
        path: Path | None = None,
    ):
        """To resume, `state` is the checkpoint read from `path`. Raises UserError where it does not fit.

        The order matters: load the weights, adapt the model, copy it for the average, compile it, and hand it
        to the engine last, which lays out the weights."""
        self.cfg, self.dataset, self.model = cfg, dataset, model
        self.batches = TrainBatches(dataset, cfg.model.max_len, cfg.loss, cfg.train)
        self.device, base = next(model.parameters()).device, None
        train_for(model, cfg.train.qat)
        if state:
            checkpoint.restore_model(model, state, path, dataset)
            base = lora.read_base(state, model, path)
        elif cfg.train.init_from:
            base = init_from.start_from(model, Path(cfg.train.init_from), dataset, cfg)
        elif cfg.model.item_table == "pq":
            codes = dist.on_main(lambda: assign_codes(dataset, cfg.model, cfg.train.seed))
            model.item_embedding.codes.copy_(codes)
        self.base = lora.adapt(model, cfg, base)
        self.averaged = deepcopy(model) if cfg.train.ema else model  # the model to evaluate
        if state:
            checkpoint.restore_training(model, self.averaged, state, path)
        if cfg.train.compile:
            for layer in model.layers:
                layer.compile(dynamic=True)  # in place, so the names in state_dict stay the same
        self.layout = layout or lay_out(cfg)
        self.engine = build_engine(model, self.averaged, cfg, self.layout)
        self.optimizer = self.engine.optimizer
        self.progress, self.history, self.background = checkpoint.Progress(), [], Background()
        if state:
            self.engine.load_optimizer(state["optimizer"], path)
            self.progress, self.history = checkpoint.Progress(**state["progress"]), state["history"]

    def open(self, out_dir: Path) -> None:
        """Start writing into out_dir. Called last, when bad input has been refused."""
        self.out_dir = out_dir
        if not dist.on_main((out_dir / "best.pth").is_file):
            # Resumed into a new folder: look for the best epoch again.
            self.progress.best_score, self.progress.bad_epochs = -math.inf, 0
        self.logger = Logger(out_dir, self.history, report.REPORT[self.dataset.task]["unit"])
        self.stop = StopRequest()
        self.started = time.time() - self.progress.seconds

    def save(self, *names: str, wait: bool = True) -> None:
        """Write a checkpoint under each of these file names, without `wait` in the background. Raises
        UserError, e.g. on a full disk, also that of the last write in the background."""
        self.progress.seconds = time.time() - self.started
        merged = self.base and lora.merged_weights(self.averaged, self.base)
        state = {
            "version": checkpoint.VERSION,
            "model": merged or self.engine.state_dict(self.averaged),
            "optimizer": self.engine.optimizer_state(),
            "progress": vars(self.progress),
            "history": self.history,
            "config": self.cfg.flat(),
        }
        if self.cfg.train.ema or self.base:
            state["trained"] = self.engine.state_dict(self.model)
        if self.base:
            state |= {"averaged": self.averaged.state_dict(), "base": asdict(self.base)}

        def write(state: dict) -> None:
            if "best.pth" in names and self.cfg.adapt.adapter != "none":
                file = self.out_dir / lora.FILE
                lora.write_adapter(file, self.averaged, self.base, self.cfg, self.dataset.items)
            whole = state | checkpoint.about_data(self.dataset)
            checkpoint.save_checkpoint(whole, self.out_dir, list(names))

        dist.on_main(lambda: self.background.run(write, state, wait))


def train(given: dict) -> None:
    """--eval_only=false: train a new model, or with --resume continue an interrupted run, then test it. Bad
    input raises UserError before the run folder is touched."""
    state, path = dist.from_main(lambda: folder.find_resume(given))
    if state:
        given = checkpoint.merge_config(given, state, path, "model", "data", "trajectory")
    cfg = build_config(given)
    layout = lay_out(cfg)
    dataset = open_dataset(cfg)
    cfg.data.dataset = cfg.data.dataset or dataset.name  # a resumed run must not find another default
    run = Run(cfg, dataset, build_model(cfg, dataset, layout), layout, state, path)
    with folder.claimed(cfg, dataset.name, path) as out_dir:
        run.open(out_dir)
        folder.keep_histories(out_dir, dataset)
        if state:
            say(f"resuming from {path}: epoch {run.progress.epoch}, step {run.progress.step}")
        with closing(run.logger):  # the progress bar must end before an error is printed
            fit(run)


def describe(given: dict) -> None:
    """--describe=true: print what was understood of the data and what a run takes, by a few steps of one;
    write nothing."""
    cfg = build_config(given)
    layout = lay_out(cfg)
    dataset = open_dataset(cfg)
    say(describe_histories(dataset))
    run = Run(cfg, dataset, build_model(cfg, dataset, layout), layout)
    say(report.describe_model(run.model, len(run.batches), run.batches.num_targets))
    seconds = []
    for step, micro_batches, num_targets in islice(run.batches.epoch(0), 4):
        begin = time.time()
        gradients = partial(compute_gradients, run, 0, step, micro_batches, num_targets)
        gradients()
        run.engine.step(gradients, num_targets)
        seconds.append(time.time() - begin)
    say(describe_cost(seconds, len(run.batches), cfg.train.num_epochs))


def fit(run: Run) -> None:
    """Train and validate epoch by epoch, then report the test result. Raises UserError on a non-finite loss
    and SystemExit after a stop signal."""
    cfg = run.cfg.train
    cfg.warmup_steps, note = optim.choose_warmup(cfg, cfg.num_epochs * len(run.batches))
    say(report.describe_model(run.model, len(run.batches), run.batches.num_targets) + note)
    say(f"results go to {run.out_dir}")
    for epoch in range(run.progress.epoch, cfg.num_epochs):
        if cfg.patience and run.progress.bad_epochs >= cfg.patience:
            say(f"validation has not improved for {cfg.patience} epochs: stopping early")
            break
        row = train_epoch(run, epoch)
        row |= validate(run, epoch)
        finish_epoch(run, row)
    run.logger.close()
    report_test(run)


def train_epoch(run: Run, epoch: int) -> dict:
    """Run the remaining steps of an epoch. Returns its log row: mean loss per target (nats, over the whole
    epoch), learning rate, seconds and targets per second (both of this launch)."""
    cfg, progress = run.cfg.train, run.progress
    num_steps = len(run.batches)
    run.model.train()
    run.logger.start_epoch(epoch, num_steps, progress.step)
    begin, targets, speed = time.time(), 0, 0.0
    for step, micro_batches, num_targets in run.batches.epoch(epoch, progress.step):
        total_step = epoch * num_steps + step
        optim.set_rates(run.optimizer, total_step, cfg.num_epochs * num_steps, cfg)
        gradients = partial(compute_gradients, run, epoch, step, micro_batches, num_targets)
        loss_sum = gradients()
        norm = run.engine.clip()
        # A signal may reach one process only, but all must stop at the same step, or the others would wait
        # forever in the next all-reduce. So the stop request is summed together with the loss.
        total, stopping = dist.sum_over_processes([loss_sum, float(bool(run.stop))])
        if not math.isfinite(total) or not norm.isfinite():
            report.refuse_non_finite(loss_sum, epoch, step, run.out_dir)
        run.engine.step(gradients, num_targets)  # may compute them again
        if cfg.ema:
            optim.update_average(run.averaged, run.model, total_step, cfg.ema)
        progress.step, progress.loss_sum = step + 1, progress.loss_sum + total
        progress.num_targets += num_targets
        targets += num_targets
        speed = targets / (time.time() - begin)
        run.logger.step(total / max(num_targets, 1), speed)
        if stopping:
            stop_early(run)
        if cfg.save_every and (total_step + 1) % cfg.save_every == 0:
            run.save("last.pth", wait=False)
    return {
        "epoch": epoch,
        "loss": progress.loss_sum / progress.num_targets,
        "lr": float(run.optimizer.param_groups[0]["lr"]),
        "train_seconds": time.time() - begin,
        "targets_per_second": speed,
    }


def compute_gradients(
    run: Run, epoch: int, step: int, micro_batches: list, num_targets: int, relabel: Callable | None = None
) -> float:
    """`accumulate_gradients` of a step. Computed again, they have the same dropout masks."""
    checkpoint.seed_step(run.cfg.train.seed, epoch, step)
    with memory_of_step(epoch, step, micro_batches):
        return accumulate_gradients(run, micro_batches, num_targets, relabel)


def accumulate_gradients(
    run: Run, micro_batches: list[dict[str, Tensor]], num_targets: int, relabel: Callable | None = None
) -> float:
    """Compute the gradients of the mean loss over the targets of ALL processes; with `relabel(model, batch)`,
    of the batches that it returns. Returns the sum of the losses of this process's targets, in nats."""
    run.optimizer.zero_grad()  # here and not per micro-batch: each backward() below adds to the gradients
    loss_sum = 0.0
    for i, batch in enumerate(micro_batches):
        torch.manual_seed(torch.initial_seed())  # draws do not depend on how the batch is cut
        batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}
        batch = relabel(run.model, batch) if relabel else batch
        # The loss is the SUM over targets, whose number differs between micro-batches, and gradients are
        # averaged over the shares of the data. This factor undoes that and divides by the targets of all
        # processes instead, so each target counts equally, however the processes share the batch.
        factor = dist.data_world() / max(num_targets, 1)
        loss_sum += run.engine.gradients(batch, factor, last=i == len(micro_batches) - 1)
    return loss_sum


def stop_early(run: Run) -> None:
    """Save last.pth in mid-epoch and exit with 128 + signal number, in all processes at the same step."""
    run.save("last.pth")
    run.logger.close()
    say(
        f"stopped at epoch {run.progress.epoch}, step {run.progress.step}; "
        f"continue with: --resume=auto --out_dir={run.out_dir}"
    )
    dist.barrier()
    raise SystemExit(128 + (run.stop.signal or 15))


def validate(run: Run, epoch: int) -> dict:
    """The validation metrics as log-row entries {"valid/NDCG@10": ...}, and the seconds that they took."""
    begin = time.time()
    with run.engine.to_evaluate(run.averaged) as model:
        metrics = evaluate(model, run.dataset, "valid", run.cfg.eval)
    row = {f"valid/{name}": value for name, value in metrics.items()}
    return row | {"eval_seconds": time.time() - begin}


def finish_epoch(run: Run, row: dict) -> None:
    """Log the epoch, compare it with the best one and save its checkpoints."""
    progress, epoch = run.progress, row["epoch"]
    _, score = choosing_metric(row, "valid/")
    better = score > progress.best_score
    progress.bad_epochs = 0 if better else progress.bad_epochs + 1
    if better:
        progress.best_score, progress.best_epoch = score, epoch
    progress.epoch, progress.step, progress.loss_sum, progress.num_targets = epoch + 1, 0, 0.0, 0
    run.logger.end_epoch(row)
    say(report.format_epoch(row, run.dataset.task) + "   best" * better)
    names = [f"epoch_{epoch}.pth", "last.pth"] + ["best.pth"] * better
    run.save(*names)
    keep, spare = run.cfg.train.keep_last, run.cfg.run.ckpt_name
    dist.on_main(lambda: checkpoint.prune(run.out_dir, keep, spare))


def report_test(run: Run) -> None:
    """Test the weights of the best validation epoch, write result.json and print the metrics."""
    # The last epoch may be worse than the best one, and choosing by the test score would be cheating.
    path = run.out_dir / "best.pth"
    model = run.model
    if run.base or not run.engine.is_plain:  # checkpoints hold merged and whole weights
        model = build_model(run.cfg, run.dataset, run.layout)
    state = dist.from_main(lambda: checkpoint.load_checkpoint(path))
    checkpoint.restore_model(model, state, path, run.dataset)
    best = run.progress.best_epoch
    result = report.describe_run(run.cfg, run.dataset) | {
        "seconds": round(time.time() - run.started, 1),
        "best_epoch": best,
        "quantize": run.cfg.train.qat,  # of the model that is measured here
        "valid": evaluate(model, run.dataset, "valid", run.cfg.eval),
        "test": evaluate(model, run.dataset, "test", run.cfg.eval),
    }
    write_json(run.out_dir / "result.json", result)
    title = f"TEST, best validation epoch {best}{report.describe_rounding(run.cfg.train.qat)}"
    say(report.format_metrics(title, result["test"], run.cfg))
    say(report.describe_files(run.out_dir))


if __name__ == "__main__":
    main()
