"""Measure RecTools' SASRec or HSTU once. Started by scripts/bench/peers.py in RecTools' own environment."""

import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch._dynamo  # noqa: F401  imported by torch's first optimizer: not part of the preparation
from pytorch_lightning import Callback, Trainer
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

warnings.filterwarnings("ignore")
WARMUP_STEPS = 2


class StepClock(Callback):
    """Records when each step ended and its number of tokens (every token has exactly one target)."""

    def __init__(self):
        self.first_start, self.ends, self.tokens = None, [], []

    def on_train_batch_start(self, *_):
        self.first_start = self.first_start or time.time()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.ends.append(time.time())
        self.tokens.append(int((batch["y"] != 0).sum()))


def build(spec: dict, clock: StepClock, max_steps: int | float) -> SASRecModel | HSTUModel:
    """The library's defaults except sizes, batch and learning rate; no features besides ids."""

    def trainer() -> Trainer:  # no logger, checkpoints or progress bar: training only
        return Trainer(
            max_epochs=1, limit_train_batches=max_steps, accelerator="cpu", devices=1, callbacks=[clock],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    kind = {"llama": SASRecModel, "hstu": HSTUModel}[spec["model_name"]]
    return kind(
        n_factors=spec["dim"], n_blocks=spec["n_layers"], n_heads=spec["n_heads"],
        dropout_rate=spec["dropout"], session_max_len=spec["max_len"], batch_size=spec["batch_size"],
        loss="softmax", lr=spec["lr"],
        item_net_block_types=(IdEmbeddingsItemNet,), get_trainer_func=trainer,
        recommend_torch_device="cpu", recommend_batch_size=spec["eval_batch_size"],
    )  # fmt: skip


def recommend(model, dataset: Dataset, asked: pd.DataFrame) -> pd.DataFrame:
    """Ten unseen items per user of `asked`, which also gives the request times that HSTU needs."""
    context = asked[["user_id", "datetime"]] if model.require_recommend_context else None
    return model.recommend(asked["user_id"].to_numpy(), dataset, k=10, filter_viewed=True, context=context)


def ndcg_at_10(recommended: pd.DataFrame, targets: pd.DataFrame) -> float:
    """NDCG@10 with one target per user."""
    hits = recommended.merge(targets, on=["user_id", "item_id"])
    return float((1 / np.log2(1 + hits["rank"])).sum() / len(targets))


def main(spec: dict) -> dict:
    """One measurement: seconds of each phase and the numbers of targets and users, or the time to a score."""
    torch.set_num_threads(spec["threads"])
    begin = time.time()
    table = pd.read_csv(spec["csv"]).rename(columns={"user": "user_id", "item": "item_id"})
    table["datetime"] = pd.to_datetime(table["timestamp"], unit="s")
    table["weight"] = 1
    from_the_end = table[::-1].groupby("user_id").cumcount()[::-1]  # 0 = the test item, 1 = validation
    train = table[from_the_end >= 2]
    dataset = Dataset.construct(train[["user_id", "item_id", "datetime", "weight"]])
    clock = StepClock()
    if spec["time_to"]:
        valid = table[from_the_end == 1]
        model = build(spec, clock, max_steps=1.0)
        score, reached = 0.0, None
        while time.time() - begin < spec["time_limit"]:
            model.fit_partial(dataset, min_epochs=1, max_epochs=1)
            recommended = recommend(model, dataset, valid)
            score = max(score, ndcg_at_10(recommended, valid[["user_id", "item_id"]]))
            if score >= spec["time_to"]:
                reached = time.time() - begin
                break
        return {"reached_seconds": reached, "best": score, "seconds": time.time() - begin}
    model = build(spec, clock, max_steps=WARMUP_STEPS + spec["steps"])
    model.fit(dataset)
    # RecTools trains with a copy of the trainer, callbacks included.
    clock = next(part for part in model.fit_trainer.callbacks if isinstance(part, StepClock))
    history = table[from_the_end >= 1]  # known when the test item is predicted
    history = Dataset.construct(history[["user_id", "item_id", "datetime", "weight"]])
    asked = table[from_the_end == 0]
    ranking = time.time()
    recommend(model, history, asked)
    train_seconds = clock.ends[-1] - clock.ends[WARMUP_STEPS - 1]
    return {
        "prepare_seconds": clock.first_start - begin,
        "train_seconds": train_seconds,
        "epoch_seconds": train_seconds / spec["steps"] * math.ceil(len(asked) / spec["batch_size"]),
        "positions": sum(clock.tokens[WARMUP_STEPS:]),
        "targets": sum(clock.tokens[WARMUP_STEPS:]),
        "eval_seconds": time.time() - ranking,
        "eval_users": len(asked),
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(spec["result"]).write_text(json.dumps(main(spec)))
