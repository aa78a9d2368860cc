"""Rank all items for every user, without sampling (--task=matching), or score every impression (--task=ctr).
Each counts exactly once under any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from data import HELD_OUT, eval_batches, impression_batches
from reclm.config import EvalConfig
from reclm.data.dataset import Dataset
from reclm.errors import UserError
from reclm.metrics import ctr_metrics, rank_of_target, ranking_sums
from reclm.nn.dealt import DealtEmbedding
from reclm.nn.heads import TIME_ERRORS
from reclm.run import dist
from reclm.run.process import return_large_tensors

# Limits of an evaluation batch, to bound memory for any catalogue and any history.
USERS_AT_ONCE = 256  # speed differs by less than 10 % between 16 and 512
MAX_SCORES = 2**26  # 256 MiB in float32
MAX_TOKENS = 2**18
MANY_ITEMS = 2**17  # above, scores are large tensors


def batch_size(dataset: Dataset, max_len: int) -> int:
    """Users (or sequences of impressions) per evaluation batch, within the limits above."""
    return max(1, min(USERS_AT_ONCE, MAX_SCORES // (dataset.num_items + 1), MAX_TOKENS // max_len))


def on_device(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Set the model to evaluation mode (no dropout) and yield the batches on its device."""
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


@torch.inference_mode()
def rank_users(
    model: nn.Module, dataset: Dataset, split: str, cfg: EvalConfig, among_cold: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(users, ranks, new_ranks) of this process's users: their indices and the float64 ranks of their
    held-out items (best is 1) among all items, or with `among_cold` among cold items only. `new_ranks`
    always leave the history out, and are 0 where the item is not new to the user. Raises UserError, in all
    processes, on a non-finite score."""
    none = torch.zeros(0, dtype=torch.double)
    users, ranks, new_ranks, broken = [none.long()], [none], [none], []
    columns, total = parts_of(model)
    max_len, cold_items = model.cfg.max_len, columns(model.cold_items) if among_cold else None
    for batch in on_device(model, eval_batches(dataset, split, max_len, batch_size(dataset, max_len))):
        scores = model(batch)  # (B, V)
        broken += batch["user_ids"][total((~scores.isfinite().all(1)).int()) > 0].tolist()
        if among_cold:
            of_cold = scores[:, cold_items]
            scores = torch.full_like(scores, -torch.inf).index_copy_(1, cold_items, of_cold)
        items, targets = scores[:, 1:], columns(batch["target_ids"]) - 1  # column 0 is padding, not an item
        kept_in = rank_of_target(items, targets, total) if cfg.filter_seen is False else None
        # A target that was used before is left out as well, not given away: it comes after all new items.
        scores.scatter_(1, columns(batch["seen_items"]), -torch.inf)
        left_out = rank_of_target(items, targets, total)
        is_new = (batch["seen_items"] != batch["target_ids"][:, None]).all(1)  # (B,)
        users.append(batch["user_ids"].cpu())
        ranks.append((left_out if kept_in is None else kept_in).cpu())
        new_ranks.append((left_out * is_new).cpu())
    # All processes must raise, not only the one with the bad scores, or the others would wait for it forever.
    broken = [user for part in dist.gather_from_processes(broken) for user in part]
    if broken:
        raise UserError(
            f"the model gives non-finite scores to {len(broken)} user(s), "
            f"first to {dataset.users[broken[0]]}: these weights cannot be evaluated, use another checkpoint"
        )
    return torch.cat(users), torch.cat(ranks), torch.cat(new_ranks)


def evaluate(model: nn.Module, dataset: Dataset, split: str, cfg: EvalConfig) -> dict[str, float]:
    """Metrics over the evaluated users of all processes, {"HR@10": ..., "NDCG@10": ..., "MRR": ...}, or with
    --task=ctr over all impressions, {"AUC": ..., "logloss": ...}. `split` is "valid" or "test". Raises
    UserError on a non-finite score."""
    # Where each process scores its part of the items, all read the same users.
    dealt = isinstance(getattr(model, "item_embedding", None), DealtEmbedding)
    sharing = dist.readers_per_share(dist.num_processes()) if dealt else nullcontext()
    memory = return_large_tensors() if dataset.num_items > MANY_ITEMS else nullcontext()
    with sharing, memory:
        return EVALUATE[model.cfg.task](model, dataset, split, cfg)


def parts_of(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(item ids -> columns of the scores of the model, a tensor -> its sum over the processes that score
    other items)"""
    table = getattr(model, "item_embedding", None)
    return (table.local, table.sum) if isinstance(table, DealtEmbedding) else (lambda x: x, lambda x: x)


def ranking_metrics(model: nn.Module, dataset: Dataset, split: str, cfg: EvalConfig) -> dict[str, float]:
    users, ranks, new_ranks = rank_users(model, dataset, split, cfg)
    metrics, count = mean_over_processes(ranking_sums(ranks), len(ranks))
    if count != len(dataset.ranked_users):
        raise AssertionError(f"ranked {count} users of {len(dataset.ranked_users)}")
    groups = {"new": new_ranks[new_ranks > 0]}
    if len(dataset.negative):  # targets that the user liked, which is what a ranking should find
        targets = dataset.offsets[users.numpy() + 1] - HELD_OUT[split]
        groups["liked"] = ranks[torch.from_numpy(~dataset.negative[targets])]
    if len(dataset.cold_items) and split == "test":  # all test targets are cold items
        groups["cold"] = rank_users(model, dataset, split, cfg, among_cold=True)[1]
    for group, part in groups.items():
        means, size = mean_over_processes(ranking_sums(part), len(part))
        if group != "new" or size < count:  # where all targets are new, it would be the same again
            metrics |= {f"{group}/{name}": value for name, value in means.items()} | {f"{group}/users": size}
    if getattr(model, "time_head", None) is not None:
        metrics |= time_metrics(model, dataset, split)
    return metrics


def mean_over_processes(sums: dict[str, float], count: int) -> tuple[dict[str, float], int]:
    """Sums over this process's `count` users -> (means over the users of all processes, their number)."""
    # Sums and counts add up; a mean of the means per process would weigh users unequally.
    count, *totals = dist.sum_over_processes([count, *sums.values()])
    return {name: total / max(count, 1) for name, total in zip(sums, totals, strict=True)}, int(count)


@torch.inference_mode()
def time_metrics(model: nn.Module, dataset: Dataset, split: str) -> dict[str, float]:
    """Mean errors of the predicted time to the held-out action over the users of all processes, {"time_NLL":
    nats, "time_MAE": of log(1 + seconds)} (reclm/nn/heads.py)."""
    sums, count = Counter(), 0
    max_len = model.cfg.max_len
    batches = eval_batches(dataset, split, max_len, batch_size(dataset, max_len))
    for batch in on_device(model, batches):
        errors = model(batch, output="time_errors")
        sums.update({name: error.double().sum().item() for name, error in errors.items()})
        count += len(batch["lengths"])
    return mean_over_processes({name: sums[name] for name in TIME_ERRORS}, count)[0]


@torch.inference_mode()
def score_impressions(model: nn.Module, dataset: Dataset, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, users), each (N,), of all impressions of a split in the order of their rows in
    Dataset, in every process: unlike HR and NDCG, an AUC is no mean over users. Raises UserError on a
    non-finite logit."""
    rows, logits = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
    batches = impression_batches(dataset, split, model.cfg.max_len, batch_size(dataset, model.cfg.max_len))
    for batch in on_device(model, batches):
        real = batch.pop("labels") >= 0  # (B, C)
        rows.append(batch["rows"][real].cpu())
        logits.append(model(batch)[real].cpu())
    rows, logits = (torch.cat(dist.gather_from_processes(torch.cat(parts))) for parts in (rows, logits))
    rows, order = rows.sort()
    logits = logits[order]
    owner = torch.from_numpy(dataset.owner[rows.numpy()])
    bad = (~logits.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"the model gives non-finite scores to {len(bad)} impression(s), first to one of user "
            f"{dataset.users[owner[bad[0, 0]]]}: these weights cannot be evaluated, use another checkpoint"
        )
    return logits, torch.from_numpy(dataset.labels[rows.numpy()]), owner


def impression_metrics(model: nn.Module, dataset: Dataset, split: str, cfg: EvalConfig) -> dict[str, float]:
    return ctr_metrics(*score_impressions(model, dataset, split))


EVALUATE = {"matching": ranking_metrics, "ctr": impression_metrics}  # by task
