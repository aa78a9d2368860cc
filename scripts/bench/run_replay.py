"""Measure RePlay's SASRec once. Started by scripts/bench/peers.py in RePlay's own environment.

Uses the current API (replay.nn) with its fast options for the CPU, all of which reduce padding: in training,
rows of similar length go through the blocks together, and columns that are all padding are cut.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import polars as pl
import torch
import torch._dynamo  # noqa: F401  imported by torch's first optimizer: not part of the preparation
from lightning import Callback, Trainer
from replay.data import FeatureHint, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback, PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import LengthBucketedQueryEncoder, SasRec
from replay.nn.transform import AdaptiveTrimTransform, TargetAwareAdaptiveTrimTransform
from replay.nn.transform.template import make_default_sasrec_transforms

warnings.filterwarnings("ignore")
WARMUP_STEPS = 2
BUCKET_SIZE = 16  # rows of similar length; the fastest of 8, 16, 32 and 64


class Clock(Callback):
    """Records when each step ended, its positions and targets, and the number of ranked users."""

    def __init__(self):
        self.first_start, self.ends, self.positions, self.targets, self.users = None, [], [], [], 0

    def on_train_batch_start(self, *_):
        self.first_start = self.first_start or time.time()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.ends.append(time.time())
        self.positions.append(int(batch["padding_mask"].sum()))
        self.targets.append(int(batch["target_padding_mask"].sum()))

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        self.users += len(batch["ground_truth"])

    def on_predict_batch_end(self, trainer, module, outputs, batch, *_):
        self.users += len(batch["user"])


class Goal(Callback):
    """Stops training at a validation score, or after the epoch in which the time limit is reached."""

    def __init__(self, begin: float, spec: dict):
        self.begin, self.spec, self.best, self.reached = begin, spec, 0.0, None

    def on_validation_end(self, trainer, module):
        self.best = max(self.best, float(trainer.callback_metrics["ndcg@10"]))
        seconds = time.time() - self.begin
        if self.best >= self.spec["time_to"]:
            self.reached = seconds
        trainer.should_stop = self.reached is not None or seconds >= self.spec["time_limit"]


def write_sequences(spec: dict, train: Path, ranked: Path) -> tuple[int, int]:
    """Write the training and the ranking sequences as parquet -> (number of items, longest history)."""
    table = pl.read_csv(spec["csv"]).with_columns(pl.col("item").rank("dense").cast(pl.Int64) - 1)
    users = table.sort("user", "timestamp").group_by("user", maintain_order=True).agg("item")
    item, length = pl.col("item"), pl.col("item").list.len()
    users.select(item.list.head(length - 2)).write_parquet(train)
    known = length - (2 if spec["time_to"] else 1)  # the next item is the target: validation's or the test's
    history, target = item.list.head(known), item.list.slice(known, 1)
    # Sorted by length, so that a batch has little padding and columns of it can be cut.
    ordered = users.sort(length).select("user", history, seen_ids=history, ground_truth=target)
    ordered.write_parquet(ranked)
    return table["item"].n_unique(), ordered["item"].list.len().max()


def load(spec: dict) -> tuple[ParquetModule, TensorSchema]:
    """The data as RePlay's module, with transforms that cut padding, and its schema."""
    folder = Path(spec["result"]).parent
    train, ranked = folder / "train.parquet", folder / "ranked.parquet"
    num_items, longest = write_sequences(spec, train, ranked)
    size = {"cardinality": num_items, "padding_value": num_items, "embedding_dim": spec["dim"]}
    kind = {"feature_type": FeatureType.CATEGORICAL, "feature_hint": FeatureHint.ITEM_ID, "is_seq": True}
    schema = TensorSchema(TensorFeatureInfo("item", **kind, **size))
    transforms = make_default_sasrec_transforms(schema)
    transforms["train"].insert(2, TargetAwareAdaptiveTrimTransform(["item", "positive_labels"]))
    for stage in ("validate", "predict"):
        transforms[stage].insert(1, AdaptiveTrimTransform("item"))

    def shapes(**lengths: int) -> dict:
        return {name: {"shape": length, "padding": num_items} for name, length in lengths.items()}

    metadata = {
        "train": shapes(item=spec["max_len"] + 1),  # one more, because the last is only a target
        "validate": shapes(item=spec["max_len"], seen_ids=longest, ground_truth=1),
        "predict": shapes(item=spec["max_len"], seen_ids=longest) | {"user": {}},
    }
    ranking = dict.fromkeys(("validate", "predict"), spec["eval_batch_size"])
    data = ParquetModule(
        {"train": spec["batch_size"]} | ranking, metadata, transforms,
        train_path=str(train), validate_path=str(ranked), predict_path=str(ranked),
    )  # fmt: skip
    return data, schema


def build(spec: dict, schema: TensorSchema) -> LightningModule:
    """The library's defaults (cross-entropy over all items is one) except sizes and learning rate."""
    model = SasRec.from_params(
        schema, embedding_dim=spec["dim"], num_heads=spec["n_heads"], num_blocks=spec["n_layers"],
        max_sequence_length=spec["max_len"], dropout=spec["dropout"],
    )  # fmt: skip
    model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, BUCKET_SIZE)
    return LightningModule(model, OptimizerFactory(learning_rate=spec["lr"]))


def main(spec: dict) -> dict:
    """One measurement: seconds of each phase and the numbers of targets and users, or the time to a score."""
    torch.set_num_threads(spec["threads"])
    begin = time.time()
    data, schema = load(spec)
    module = build(spec, schema)
    seen = SeenItemsFilter(schema.item_id_features.item().cardinality)
    metrics = ComputeMetricsCallback(["ndcg"], [10], [seen], verbose=False)
    if spec["predict"]:  # a table of user, item and score instead
        metrics = PandasTopItemsCallback(10, "user", "item", "score", [seen])

    def trainer(watch: Callback, **settings) -> Trainer:  # no logs or checkpoints: training only
        return Trainer(
            accelerator="cpu", devices=1, callbacks=[metrics, watch], num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip

    if spec["time_to"]:
        goal = Goal(begin, spec)
        trainer(goal, max_epochs=-1).fit(module, data)
        return {"reached_seconds": goal.reached, "best": goal.best, "seconds": time.time() - begin}
    clock = Clock()
    steps = {"max_epochs": 1, "limit_train_batches": WARMUP_STEPS + spec["steps"]}
    trainer(clock, limit_val_batches=0, **steps).fit(module, data)
    ranking = time.time()
    if spec["predict"]:
        trainer(clock).predict(module, data, return_predictions=False)
        metrics.get_result()
    else:
        trainer(clock).validate(module, data, verbose=False)
    eval_seconds = time.time() - ranking
    train_seconds = clock.ends[-1] - clock.ends[WARMUP_STEPS - 1]
    step_seconds = train_seconds / (len(clock.ends) - WARMUP_STEPS)
    return {
        "prepare_seconds": clock.first_start - begin,
        "train_seconds": train_seconds,
        "epoch_seconds": step_seconds * len(data.datasets["train"]),
        "positions": sum(clock.positions[WARMUP_STEPS:]),
        "targets": sum(clock.targets[WARMUP_STEPS:]),
        "eval_seconds": eval_seconds,
        "eval_users": clock.users,
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(spec["result"]).write_text(json.dumps(main(spec)))
