"""Train and evaluate a sequential recommender.

    torchrun --standalone --nproc_per_node=2 main.py --eval_only=false
    torchrun --standalone --nproc_per_node=2 main.py --eval_only=true --ckpt_name='epoch_15.pth'
    python main.py --config=configs/sasrec.yaml --seed=1     # one process, a recipe, a changed setting
    python main.py --help                                    # every flag

Reading order: this file, model.py, data.py, evaluate.py; then reclm/ by need.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads halve a shared CPU

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Dataset, TrainBatches, load_dataset
from evaluate import evaluate
from model import BLOCKS, SequenceRecommender
from reclm import checkpoint, dist, runs
from reclm.config import Config, ModelConfig, build_config, parse_args
from reclm.errors import UserError
from reclm.features import choose_inputs
from reclm.logger import Logger, say, write_json
from reclm.metrics import chooses
from reclm.optim import build_optimizer, learning_rate, update_average

MODEL_NAMES = [field.name for field in fields(ModelConfig)]
DATA_NAMES = [
    "dataset", "min_item_count", "shuffle_ties", "cold_items", "ctr_split", "positive_from", "drop_rating",
    "min_positives", "utc_offset", "split_seed",
]  # fmt: skip
MODELS = dict.fromkeys(BLOCKS, SequenceRecommender)  # by --model_name; scripts/ctr_baselines.py adds its own


def main(parse: Callable[[], dict] = parse_args) -> None:
    with dist.distributed():
        said = parse()
        if said.get("eval_only"):
            evaluate_checkpoint(said)
        else:
            train(said)


def evaluate_checkpoint(said: dict) -> None:
    """--eval_only=true: validation and test metrics of a saved model, on any number of ranks."""
    out_dir = runs.chosen_dir(said)
    path = checkpoint.find_checkpoint(said.get("ckpt_name", "best.pth"), out_dir)
    cfg, dataset, model = open_checkpoint(said, path)
    result = runs.describe_run(cfg, dataset) | {"checkpoint": str(path)}
    for split in ("valid", "test"):
        result[split] = evaluate(model, dataset, split, cfg.eval)
        say(runs.format_metrics(f"{split.upper()} of {path}", result[split], cfg))
    target = out_dir / f"eval-{path.stem}.json"
    write_json(target, result)
    say(f"written to {target}")


def open_checkpoint(said: dict, path: Path) -> tuple[Config, Dataset, nn.Module]:
    """The settings of a checkpoint and what the user said beside them, its data and its model."""
    state = checkpoint.load_checkpoint(path)
    fixed = [name for name in (*MODEL_NAMES, *DATA_NAMES) if name != "dtype"]
    cfg = build_config(checkpoint.merge_config(said, state, path, fixed))
    dataset = choose_inputs(load_dataset(cfg.data, cfg.model.task), cfg)
    say(runs.describe_data(dataset, cfg.model))
    model = build_model(cfg, dataset)
    checkpoint.restore_model(model, state, path, dataset)
    return cfg, dataset, model


def build_model(cfg: Config, dataset: Dataset) -> nn.Module:
    name = cfg.model.model_name
    if name not in MODELS:
        raise UserError(f"{name} is no model of this program: run the script that trained it")
    torch.manual_seed(cfg.train.seed)  # the same initial weights on every rank
    model = MODELS[name](cfg.model, cfg.loss, dataset.vocabulary)
    return model.to(dist.pick_device(cfg.run.device))


@dataclass
class Progress:
    """Where a run stands; with model and optimizer, all that a checkpoint holds."""

    epoch: int = 0  # the next epoch to run
    step: int = 0  # the next step in it
    loss_sum: float = 0.0  # over the steps of this epoch so far
    num_targets: int = 0  # in them
    seconds: float = 0.0  # of the whole run so far
    best_score: float = -math.inf  # of validation, see metrics.CHOOSE_BY
    best_epoch: int = -1
    bad_epochs: int = 0  # since the best


class Trainer:
    """A run in flight: what `train` wires together and the epoch loop passes on."""

    def __init__(self, cfg: Config, dataset: Dataset, state: dict | None, path: Path | None):
        self.cfg, self.dataset = cfg, dataset
        self.batches = TrainBatches(dataset, cfg.model.max_len, cfg.loss, cfg.train)
        self.model = build_model(cfg, dataset)
        self.evaluated = deepcopy(self.model) if cfg.train.ema else self.model
        if cfg.train.compile:
            for layer in self.model.layers:
                layer.compile(dynamic=True)  # in place: the names of the weights stay
        self.optimizer = build_optimizer(self.model, cfg.train)
        self.progress, self.history = Progress(), []
        if state:
            checkpoint.restore_model(self.evaluated, state, path, dataset)
            if cfg.train.ema:
                self.model.load_state_dict(state.get("trained", state["model"]))
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress, self.history = Progress(**state["progress"]), state["history"]
        elif cfg.train.init_from:
            checkpoint.start_from(self.model, Path(cfg.train.init_from), dataset, cfg)
            self.evaluated.load_state_dict(self.model.state_dict())
        self.parallel = dist.data_parallel(self.model)

    def open(self, out_dir: Path) -> None:
        """From here on the run writes into out_dir; all that can be refused has been by now."""
        self.out_dir = out_dir
        if not (out_dir / "best.pth").is_file():  # resumed into a new folder: its own best counts
            self.progress.best_score, self.progress.bad_epochs = -math.inf, 0
        unit = "impressions" if self.cfg.model.task == "ctr" else "tokens"
        self.logger = Logger(out_dir, self.history, unit)
        self.stop = dist.StopRequest()
        self.started = time.time() - self.progress.seconds

    def save(self, *names: str) -> None:
        self.progress.seconds = time.time() - self.started
        state = {
            "version": checkpoint.VERSION,
            "model": self.evaluated.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
            "history": self.history,
            "config": self.cfg.flat(),
            "dataset": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "ids": self.dataset.ids,
        }
        if self.cfg.train.ema:
            state["trained"] = self.model.state_dict()
        dist.on_main(lambda: checkpoint.save_checkpoint(state, self.out_dir, list(names)))


def train(said: dict) -> None:
    """--eval_only=false: a new run, or with --resume the rest of an old one."""
    state, path = runs.find_resume(said)
    if state:
        names = [*MODEL_NAMES, *DATA_NAMES, *checkpoint.TRAJECTORY]
        said = checkpoint.merge_config(said, state, path, names)
    cfg = build_config(said)
    dataset = choose_inputs(load_dataset(cfg.data, cfg.model.task), cfg)
    cfg.data.dataset = cfg.data.dataset or dataset.name  # what was found; a resumed run keeps to it
    say(runs.describe_data(dataset, cfg.model))
    run = Trainer(cfg, dataset, state, path)
    run.open(dist.on_main(lambda: runs.claim_dir(cfg, dataset.name, path)))
    say(runs.describe_model(run.model, len(run.batches), run.batches.num_targets))
    say(f"results go to {run.out_dir}")
    if state:
        say(f"going on from {path}: epoch {run.progress.epoch}, step {run.progress.step}")
    for epoch in range(run.progress.epoch, cfg.train.num_epochs):
        if cfg.train.patience and run.progress.bad_epochs >= cfg.train.patience:
            say(f"no better validation for {cfg.train.patience} epochs: stopping early")
            break
        row = train_epoch(run, epoch)
        row |= validate(run, epoch)
        finish_epoch(run, row)
    run.logger.close()
    report(run)


def train_epoch(run: Trainer, epoch: int) -> dict:
    """Run the (remaining) steps of an epoch. Returns its row for the log."""
    cfg, progress = run.cfg.train, run.progress
    num_steps = len(run.batches)
    run.model.train()
    run.logger.start_epoch(epoch, num_steps, progress.step)
    begin, targets, speed = time.time(), 0, 0.0
    for step, micro_batches, num_targets in run.batches.epoch(epoch, progress.step):
        checkpoint.seed_step(cfg.seed, epoch, step)
        total_step = epoch * num_steps + step
        lr = learning_rate(total_step, cfg.num_epochs * num_steps, cfg)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = accumulate_gradients(run, micro_batches, num_targets)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), cfg.clip_norm or math.inf)
        total, stopping = dist.sum_over_ranks([loss_sum, float(bool(run.stop))])
        if not math.isfinite(total) or not norm.isfinite():
            refuse_non_finite(run, epoch, step, loss_sum)
        run.optimizer.step()
        if cfg.ema:
            update_average(run.evaluated, run.model, total_step, cfg.ema)
        progress.step, progress.loss_sum = step + 1, progress.loss_sum + total
        progress.num_targets += num_targets
        targets += num_targets
        speed = targets / (time.time() - begin)
        run.logger.step(total / max(num_targets, 1), speed)
        if stopping:
            stop_early(run)
    return {
        "epoch": epoch,
        "loss": progress.loss_sum / progress.num_targets,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train_seconds": time.time() - begin,
        "tokens_per_second": speed,
    }


def accumulate_gradients(run: Trainer, micro_batches: list[dict[str, Tensor]], num_targets: int) -> float:
    """Gradients of the mean loss over the targets of ALL ranks. Returns this rank's sum of losses."""
    run.optimizer.zero_grad()
    device = run.model.item_embedding.weight.device
    loss_sum = 0.0
    for i, batch in enumerate(micro_batches):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        last = i == len(micro_batches) - 1
        with nullcontext() if last or run.parallel is run.model else run.parallel.no_sync():
            loss = run.parallel(batch)
            # DDP averages gradients over ranks; the factor turns that into the sum over all targets
            # divided by their number, which does not depend on how they lie on the ranks.
            (loss * (dist.world_size() / max(num_targets, 1))).backward()
        loss_sum += loss.item()
    return loss_sum


def refuse_non_finite(run: Trainer, epoch: int, step: int, loss_sum: float) -> None:
    """Called by all ranks before the step is taken, so the saved weights are untouched."""
    bad = [r for r, loss in enumerate(dist.gather_from_ranks(loss_sum)) if not math.isfinite(loss)]
    run.logger.close()
    what = f"the loss became NaN or infinite on rank {bad[0]}" if bad else "the gradient overflowed"
    raise UserError(
        f"{what} at epoch {epoch}, step {step}: try a smaller --lr, or --dtype=float32; "
        f"what was saved before is whole, in {run.out_dir}"
    )


def stop_early(run: Trainer) -> None:
    """After SIGTERM or Ctrl-C, agreed on by all ranks: save the middle of the epoch and leave."""
    run.save("last.pth")
    run.logger.close()
    say(
        f"stopped at epoch {run.progress.epoch}, step {run.progress.step}; "
        f"go on with: --resume=auto --out_dir={run.out_dir}"
    )
    dist.barrier()
    raise SystemExit(128 + (run.stop.signal or 15))


def validate(run: Trainer, epoch: int) -> dict:
    """Validation metrics of all users, for the row of this epoch."""
    begin = time.time()
    metrics = evaluate(run.evaluated, run.dataset, "valid", run.cfg.eval)
    row = {f"valid/{name}": value for name, value in metrics.items()}
    return row | {"eval_seconds": time.time() - begin}


def finish_epoch(run: Trainer, row: dict) -> None:
    """Log the epoch, remember the best, save."""
    progress, epoch = run.progress, row["epoch"]
    _, score = chooses(row, "valid/")
    better = score > progress.best_score
    progress.bad_epochs = 0 if better else progress.bad_epochs + 1
    if better:
        progress.best_score, progress.best_epoch = score, epoch
    progress.epoch, progress.step, progress.loss_sum, progress.num_targets = epoch + 1, 0, 0.0, 0
    run.logger.end_epoch(row)
    say(runs.format_epoch(row) + "   best" * better)
    names = [f"epoch_{epoch}.pth", "last.pth"] + ["best.pth"] * better
    run.save(*names)
    keep, spare = run.cfg.train.keep_last, run.cfg.run.ckpt_name
    dist.on_main(lambda: checkpoint.prune(run.out_dir, keep, spare))


def report(run: Trainer) -> None:
    """The test result of the best validation epoch, and where everything lies."""
    path = run.out_dir / "best.pth"
    checkpoint.restore_model(run.model, checkpoint.load_checkpoint(path), path, run.dataset)
    best = run.progress.best_epoch
    result = runs.describe_run(run.cfg, run.dataset) | {
        "seconds": round(time.time() - run.started, 1),
        "best_epoch": best,
        "valid": evaluate(run.model, run.dataset, "valid", run.cfg.eval),
        "test": evaluate(run.model, run.dataset, "test", run.cfg.eval),
    }
    write_json(run.out_dir / "result.json", result)
    title = f"TEST, best validation epoch {best}"
    say(runs.format_metrics(title, result["test"], run.cfg))
    say(runs.describe_files(run.out_dir))


if __name__ == "__main__":
    main()
