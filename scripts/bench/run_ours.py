"""One measurement of Toy-RecLM through its own epoch loop; started by scripts/bench.py under torchrun."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the spine

import torch._dynamo  # noqa: F401  torch's first optimizer imports it: no part of the preparation

import main as program
from data import load_dataset
from evaluate import evaluate
from reclm.config import build_config
from reclm.run import dist


def settings(spec: dict) -> dict:
    """The sizes of the comparison, or for the time to a score simply our defaults."""
    said = {"dataset": spec["csv"], "device": "cpu", "model_name": spec["model_name"]}
    if not spec["time_to"]:
        said |= {name: spec[name] for name in ("dim", "n_layers", "n_heads", "max_len", "dropout")}
        said |= {name: spec[name] for name in ("loss", "batch_size", "lr", "eval_batch_size")}
        said["exclude_history"] = False  # no peer leaves it out of the loss
    return said


def measure(spec: dict) -> dict:
    begin = time.time()
    cfg = build_config(settings(spec))
    dataset = load_dataset(cfg.data)
    run = program.Run(cfg, dataset, None, None)
    next(run.batches.epoch(0))
    prepared = time.time() - begin
    out_dir = Path(spec["result"]).parent / "ours"
    dist.on_main(lambda: out_dir.mkdir(exist_ok=True))
    run.open(out_dir)
    if spec["time_to"]:
        score, reached = 0.0, None
        for epoch in range(cfg.train.num_epochs):
            program.train_epoch(run, epoch)
            score = max(score, program.validate(run, epoch)["valid/NDCG@10"])
            run.progress.step = 0
            if score >= spec["time_to"]:
                reached = time.time() - begin
                break
        return {"reached_seconds": reached, "best": score, "seconds": time.time() - begin}
    program.train_epoch(run, 0)  # warm-up
    run.progress.step = 0
    row = program.train_epoch(run, 1)
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
        result = measure(spec)
        dist.on_main(lambda: Path(spec["result"]).write_text(json.dumps(result)) and None)
