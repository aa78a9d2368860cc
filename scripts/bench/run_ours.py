"""Measure Toy-RecLM once, through its own epoch loop. Started by scripts/bench/peers.py."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure  # noqa: F401  puts the spine on sys.path
import torch._dynamo  # noqa: F401  imported by torch's first optimizer: not part of the preparation

import main as program
from evaluate import evaluate
from reclm.config import build_config
from reclm.run import dist


def settings(spec: dict) -> dict:
    """The sizes of the comparison, or our defaults when timing to a score."""
    given = {"dataset": spec["csv"], "device": "cpu", "model_name": spec["model_name"]}
    if spec["time_to"]:
        return given
    return spec | given | {"exclude_history": False}  # no peer excludes the history from the loss


def ours(spec: dict) -> dict:
    """One measurement: seconds of each phase and the numbers of targets and users, or the time to a score."""
    begin = time.time()
    cfg = build_config(settings(spec))  # entries of `spec` that are not settings are ignored
    dataset = program.open_dataset(cfg)
    run = program.Run(cfg, dataset, program.build_model(cfg, dataset))
    next(run.batches.epoch(0))
    prepared = time.time() - begin
    out_dir = Path(spec["result"]).parent / "ours"
    dist.on_main(lambda: out_dir.mkdir(exist_ok=True))
    run.open(out_dir)

    def train(epoch: int) -> dict:
        run.progress = program.checkpoint.Progress()  # start of an epoch
        return program.train_epoch(run, epoch)

    if spec["time_to"]:
        score, reached = 0.0, None
        for epoch in range(cfg.train.num_epochs):
            train(epoch)
            score = max(score, program.validate(run, epoch)["valid/NDCG@10"])
            if score >= spec["time_to"]:
                reached = time.time() - begin
                break
        return {"reached_seconds": reached, "best": score, "seconds": time.time() - begin}
    train(0)  # warm-up
    row = train(1)
    ranking = time.time()
    evaluate(run.model, dataset, "test", cfg.eval)
    return {
        "prepare_seconds": prepared,
        "train_seconds": row["train_seconds"],
        "epoch_seconds": row["train_seconds"],
        "steps": len(run.batches),
        "positions": run.batches.num_targets,
        "targets": run.batches.num_targets,
        "eval_seconds": time.time() - ranking,
        "eval_users": len(dataset.ranked_users),
    }


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    with dist.distributed():
        result = ours(spec)
        dist.on_main(lambda: Path(spec["result"]).write_text(json.dumps(result)))
