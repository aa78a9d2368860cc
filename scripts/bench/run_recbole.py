"""Measure RecBole's SASRec once. Started by scripts/bench/peers.py in RecBole's own environment."""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  imported by torch's first optimizer: not part of the preparation
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

WARMUP_STEPS = 2
VALIDATE_EVERY = 500  # steps; an epoch has thousands, as every prefix of a sequence is a row


class Steps:
    """The first `count` batches of a loader, timed and counted, as RecBole's epoch loop expects them."""

    shuffle = False

    def __init__(self, loader, count: int):
        self.loader, self.count = loader, count
        self.starts, self.positions, self.targets = [], [], []

    def __iter__(self):
        for batch in islice(self.loader, self.count):
            self.starts.append(time.time())
            self.positions.append(int(batch["item_length"].sum()))
            self.targets.append(len(batch["item_length"]))
            yield batch


def settings(spec: dict) -> dict:
    """Sizes of the comparison; otherwise RecBole's recommendations: CE loss, full ranking, leave-one-out."""
    return {
        "data_path": str(Path(spec["inter"]).parent.parent),
        "checkpoint_dir": str(Path(spec["result"]).parent),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "hidden_size": spec["dim"], "inner_size": 4 * spec["dim"],
        "n_layers": spec["n_layers"], "n_heads": spec["n_heads"],
        "hidden_dropout_prob": spec["dropout"], "attn_dropout_prob": spec["dropout"],
        "MAX_ITEM_LIST_LENGTH": spec["max_len"], "train_batch_size": spec["batch_size"],
        "eval_batch_size": spec["eval_batch_size"], "learning_rate": spec["lr"],
        "loss_type": "CE", "train_neg_sample_args": None, "use_gpu": False, "show_progress": False,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["NDCG", "Hit"], "topk": [10], "valid_metric": "NDCG@10", "reproducibility": False,
        "state": "ERROR",
    }  # fmt: skip


def main(spec: dict) -> dict:
    """One measurement: seconds of each phase and the numbers of targets and users, or the time to a score."""
    torch.set_num_threads(spec["threads"])
    begin = time.time()
    sys.argv = sys.argv[:1]  # RecBole also parses the command line
    config = Config(model="SASRec", dataset=Path(spec["inter"]).stem, config_dict=settings(spec))
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    model = SASRec(config, train_data.dataset)
    trainer = Trainer(config, model)
    if spec["time_to"]:
        score, reached = 0.0, None
        while time.time() - begin < spec["time_limit"]:
            trainer._train_epoch(Steps(train_data, VALIDATE_EVERY), 0)
            score = max(score, trainer.evaluate(valid_data, load_best_model=False)["ndcg@10"])
            if score >= spec["time_to"]:
                reached = time.time() - begin
                break
        return {"reached_seconds": reached, "best": float(score), "seconds": time.time() - begin}
    steps = Steps(train_data, WARMUP_STEPS + spec["steps"])
    trainer._train_epoch(steps, 0)
    train_end = time.time()
    train_seconds = train_end - steps.starts[WARMUP_STEPS]
    # load_best_model=False: its torch.load does not work with torch >= 2.6
    trainer.evaluate(test_data, load_best_model=False)
    return {
        "prepare_seconds": steps.starts[0] - begin,
        "train_seconds": train_seconds,
        "epoch_seconds": train_seconds / spec["steps"] * len(train_data),
        "positions": sum(steps.positions[WARMUP_STEPS:]),
        "targets": sum(steps.targets[WARMUP_STEPS:]),
        "eval_seconds": time.time() - train_end,
        "eval_users": len(test_data.dataset),
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(spec["result"]).write_text(json.dumps(main(spec)))
