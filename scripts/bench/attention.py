"""Grouped-query and sliding-window attention: NDCG@10, and what a session costs.

    pip install -r requirements-dev.txt
    python scripts/bench/attention.py --parts=sessions
    python scripts/bench/attention.py --parts=quality --runs=runs/attention --data_dir=data

sessions  bytes of the KV cache of a full session, and median ms to add an action to it, by length T, query
          heads per key head and window W: a random model of 4 blocks, width 256 and 8 heads, one thread
quality   test NDCG@10 of configs/speedrun.yaml with 4 heads, by query heads per key head and by window

Trainings take one process and one thread each, about 8 minutes; those that --runs holds are not repeated.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import seconds, show
from results import spread
from torch import Tensor
from trainings import ROOT, as_flags, test_metrics, trained

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError, run_script
from reclm.nn.incremental import History, extend, read
from reclm.run.logger import say
from reclm.run.output import ScriptParser, write_whole
from reclm.run.report import stamp

RECORD = ROOT / "configs" / "records" / "bench_attention.json"
NUM_ITEMS, HEADS = 10_000, 8
GROUPS, WINDOWS = (1, 2, 4), (16, 64, 128, 512)  # query heads per key head; W
LENGTHS = (200, 2000)  # T
QUALITY = {  # name: flags
    "all positions, 1 query head per key head": {},
    "2 query heads per key head": {"n_kv_heads": 2},
    "4 query heads per key head": {"n_kv_heads": 1},
    **{f"window {w}": {"window": w} for w in (16, 32, 64, 128)},
}


def sessions(args: argparse.Namespace) -> list[dict]:
    """One row per length, number of query heads per key head, and window."""
    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        cases = [(group, 0) for group in GROUPS] + [(1, w) for w in WINDOWS if w < length]
        cases.append((GROUPS[-1], WINDOWS[1]))  # both
        histories = [open_session(length, group, window) for group, window in cases]
        taken = seconds([partial(add_action, *history) for history in histories], args.rounds)
        rows += [
            {
                "T": length,
                "query heads per key head": group,
                "W": window or length,
                "cache, KiB": cache_bytes(history) / 1024,
                "ms per added action": 1e3 * ms,
            }
            for (group, window), (_, history), ms in zip(cases, histories, taken, strict=True)
        ]
    return rows


def open_session(length: int, group: int, window: int) -> tuple[SequenceRecommender, History]:
    """A random model and a session of one action less than it can see."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        max_len=length, dim=256, n_layers=4, n_heads=HEADS, n_kv_heads=HEADS // group, window=window
    )
    model = SequenceRecommender(cfg, LossConfig(), Vocabulary(NUM_ITEMS, 1)).eval()
    return model, read(model, made_up(length - 1))


def made_up(length: int) -> dict[str, Tensor]:
    """A batch of one session of random items."""
    ids = torch.randint(1, NUM_ITEMS + 1, (1, length))
    zero = torch.zeros(1, dtype=torch.long)
    return {"item_ids": ids, "lengths": zero + length, "user_ids": zero, "num_before": zero}


def add_action(model: SequenceRecommender, history: History) -> None:
    """The last action that fits, again and again: each call overwrites the one before."""
    lengths, actions, before = history.lengths, history.num_actions, history.last["num_before"]
    extend(model, history, {"item_ids": torch.tensor([1])})
    history.lengths, history.num_actions, history.last["num_before"] = lengths, actions, before


def cache_bytes(history: History) -> int:
    """Bytes of keys and values of all layers."""
    return sum(x.numel() * x.element_size() for cache in history.caches for x in (cache.keys, cache.values))


def quality(args: argparse.Namespace) -> list[dict]:
    """One row per entry of QUALITY."""
    rows = []
    for name, flags in QUALITY.items():
        given = {"config": "configs/speedrun.yaml", "n_heads": 4, **flags, "data_dir": args.data_dir}
        words = "-".join(f"{key}={value}" for key, value in flags.items()) or "base"
        folders = [
            trained(args.runs / f"{words}-seed{seed}", as_flags(given | {"seed": seed}))
            for seed in args.seeds
        ]
        tests = [test_metrics(folder) for folder in folders]
        scores = {f"test {m}": spread([test[m] for test in tests]) for m in ("NDCG@10", "HR@10")}
        rows.append({"attention": name} | scores | {"seeds": len(tests)})
        say(" ".join(map(str, rows[-1].values())))
    return rows


PARTS = {"sessions": sessions, "quality": quality}


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--rounds", type=int, default=50, help="of sessions [50]")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of quality [0]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "attention", help="folder of trainings")
    parser.add_argument("--data_dir", help="as for main.py")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"JSON file to add to [{RECORD.name}]")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS) or args.rounds < 1 or not args.seeds:
        raise UserError(f"--parts must be of {', '.join(PARTS)}, --rounds at least 1, --seeds not empty")
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in parts:
        found = PARTS[part](args)
        show(part, found)
        record[part] = stamp() | {"results": found}
        text = json.dumps(record, indent=1) + "\n"
        write_whole(args.out, lambda path, text=text: path.write_text(text))
    say(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
