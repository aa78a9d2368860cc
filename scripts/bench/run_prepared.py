"""Train some steps on prepared data, and do all else that a training does with them. Started by
scripts/bench/prepare.py: python run_prepared.py FOLDER STEPS RESULT.json"""

import json
import sys
import tempfile
import time
from itertools import chain, count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measure  # before torch
import torch

import main as program
from data import eval_batches
from reclm.config import build_config
from reclm.run import checkpoint, folder, optim

SETTINGS = {"device": "cpu", "max_len": 50, "batch_size": 128, "num_negatives": 256}


def run(data: str, steps: int) -> dict:
    """{"steps/s", "peak GiB", ...}; the first tenth of the steps is a warm-up."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    cfg = build_config({"dataset": data} | SETTINGS)
    dataset = program.open_dataset(cfg)
    training = program.Run(cfg, dataset, program.build_model(cfg, dataset))
    opened = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(dir=Path(data).parent) as out:  # as a run starts, saves and ends
        folder.keep_histories(Path(out), dataset)
        checkpoint.about_data(dataset)
        for _ in islice(eval_batches(dataset, "test", cfg.model.max_len, 256), 50):
            pass
        batches = chain.from_iterable(map(training.batches.epoch, count()))  # epoch after epoch
        for done, (step, micro_batches, num_targets) in enumerate(islice(batches, steps)):
            if done == steps // 10:
                begin = time.perf_counter()
            program.compute_gradients(training, 0, step, micro_batches, num_targets)
            optim.take_step(training.optimizer, None, num_targets)
    seconds = time.perf_counter() - begin
    return {
        "rows": len(dataset.item_ids),
        "users": dataset.num_users,
        "items": dataset.num_items,
        "seconds to open": opened,
        "steps/s": (steps - steps // 10) / seconds,
        "peak GiB": measure.own_peak() / 1024,
    }


if __name__ == "__main__":
    data, steps, result = sys.argv[1:]
    Path(result).write_text(json.dumps(run(data, int(steps))))
