"""Full-catalogue ranking: every user, every item, no sampling; or, of a ranker, every impression. Exact under
any number of ranks."""

from collections import Counter

import numpy as np
import torch

from data import HELD_OUT, Dataset, eval_batches, impression_batches
from model import SequenceRecommender
from reclm import dist
from reclm.config import EvalConfig
from reclm.errors import UserError
from reclm.metrics import click_metrics, rank_of_target, ranking_sums
from reclm.next_time import TIME_ERRORS, time_errors, training_spread

MAX_SCORES = 2**26  # scores held at once: 256 MiB in float32, whatever the size of the catalogue


@torch.inference_mode()
def rank_users(
    model: SequenceRecommender, dataset: Dataset, split: str, cfg: EvalConfig, among_cold: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(user ids, ranks) of this rank's users, both (users,), among all items or those held out of training;
    raises UserError on a non-finite score."""
    model.eval()
    device = next(model.parameters()).device
    batch_size = max(1, min(cfg.eval_batch_size, MAX_SCORES // (dataset.num_items + 1)))
    users, ranks, broken = [], [], []
    for batch in eval_batches(dataset, split, model.cfg.max_len, batch_size):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        scores = model(batch).float()  # (B, V)
        broken += batch["user_ids"][~scores.isfinite().all(1)].tolist()
        target = scores.gather(1, batch["target_ids"][:, None])  # (B, 1)
        scores[:, 0 if not among_cold else ~model.cold] = -torch.inf  # padding is no candidate
        if cfg.filter_seen:
            scores.scatter_(1, batch["seen_items"], -torch.inf)
            scores.scatter_(1, batch["target_ids"][:, None], target)  # a target is never excluded
        users.append(batch["user_ids"].cpu())
        ranks.append(rank_of_target(scores, batch["target_ids"]).cpu())
    broken = [user for part in dist.gather_from_ranks(broken) for user in part]
    if broken:
        raise UserError(
            f"the model gives non-finite scores to {len(broken)} user(s), "
            f"the first of them {dataset.users[broken[0]]}: these weights cannot be evaluated"
        )
    empty = torch.zeros(0)  # a rank may have no users at all
    return torch.cat([empty.long(), *users]), torch.cat([empty.double(), *ranks])


def evaluate(model: SequenceRecommender, dataset: Dataset, split: str, cfg: EvalConfig) -> dict[str, float]:
    """{"HR@10": ..., "NDCG@10": ..., "MRR": ...} over all evaluated users of all ranks; of a ranker
    {"AUC": ..., "logloss": ...} over all impressions of the split."""
    if model.cfg.task == "ctr":
        return click_metrics(*score_impressions(model, dataset, split, cfg))
    users, ranks = rank_users(model, dataset, split, cfg)
    metrics, count = mean_over_ranks(ranking_sums(ranks), len(ranks))
    if count != len(dataset.evaluated):
        raise AssertionError(f"ranked {count} users of {len(dataset.evaluated)}")
    if len(dataset.negative):  # how well are those ranked that the user liked?
        targets = dataset.offsets[users.numpy() + 1] - HELD_OUT[split]
        liked = ranks[torch.from_numpy(~dataset.negative[targets])]
        of_liked, count = mean_over_ranks(ranking_sums(liked), len(liked))
        metrics |= {f"liked/{name}": value for name, value in of_liked.items()} | {"liked/users": count}
    if len(dataset.cold_items) and split == "test":  # where each target is one of them
        _, ranks = rank_users(model, dataset, split, cfg, among_cold=True)
        of_cold, _ = mean_over_ranks(ranking_sums(ranks), len(ranks))
        metrics |= {f"cold/{name}": value for name, value in of_cold.items()}
    if getattr(model, "time_head", None) is not None:
        metrics |= evaluate_times(model, dataset, split, cfg)
    return metrics


def mean_over_ranks(sums: dict[str, float], count: int) -> tuple[dict[str, float], int]:
    """Sums over this rank's users, and their number -> means over those of all ranks, and their number."""
    count, *totals = dist.sum_over_ranks([count, *sums.values()])
    return {name: total / max(count, 1) for name, total in zip(sums, totals, strict=True)}, int(count)


@torch.inference_mode()
def evaluate_times(
    model: SequenceRecommender, dataset: Dataset, split: str, cfg: EvalConfig
) -> dict[str, float]:
    """Means over all evaluated users of what reclm/next_time.py says of the time to the held-out action."""
    model.eval()
    device = next(model.parameters()).device
    spread, sums, count = training_spread(dataset), Counter(), 0
    for batch in eval_batches(dataset, split, model.cfg.max_len, cfg.eval_batch_size):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = model.encode(batch, last_only=True)[:, 0]  # (B, D)
        errors = time_errors(model.time_head, hidden, batch, spread)
        sums.update({name: error.double().sum().item() for name, error in errors.items()})
        count += len(hidden)
    return mean_over_ranks({name: sums[name] for name in TIME_ERRORS}, count)[0]


@torch.inference_mode()
def score_impressions(
    model: SequenceRecommender, dataset: Dataset, split: str, cfg: EvalConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and users, each (N,), of all impressions of a split in the order of their rows, on every
    rank; raises UserError on a logit that is not finite."""
    model.eval()
    device = next(model.parameters()).device
    rows, logits = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
    for batch in impression_batches(dataset, split, model.cfg.max_len, cfg.eval_batch_size):
        shown = batch.pop("targets") > 0  # (B, C)
        rows.append(batch["rows"][shown])
        logits.append(model({name: tensor.to(device) for name, tensor in batch.items()}).cpu()[shown])
    rows, logits = (torch.cat(dist.gather_from_ranks(torch.cat(parts))) for parts in (rows, logits))
    rows, order = rows.sort()
    logits = logits[order]
    owner = torch.from_numpy(np.searchsorted(dataset.offsets, rows.numpy(), side="right") - 1)
    bad = (~logits.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"the model gives non-finite scores to {len(bad)} impression(s), the first of them of user "
            f"{dataset.users[owner[bad[0, 0]]]}: these weights cannot be evaluated"
        )
    return logits, torch.from_numpy(dataset.labels[rows.numpy()]), owner
