"""Training objectives: pure functions of hidden states and the item table.

Each takes float32 hidden (M, D) of the M positions with a target, the item table, (V, D) or that of
reclm/nn/pq.py, targets (M,), negatives (N,) shared by all positions or (M, N), and `excluded`: a bool (M, N)
that is True for negatives to ignore, an `Excluded` for a loss without negatives, or None. Each returns a
scalar, the SUM over the M positions in nats: the caller divides it by the number of targets of all processes.
No tensor grows with M times V, since there may be millions of items.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores per chunk of `softmax`: 2 MiB fit into the cache of a CPU; a GPU is faster with larger products.
CHUNK_SCORES = {"cpu": 2**19, "cuda": 2**27}
CHUNK_POSITIONS = 128  # positions per chunk at least, however large the catalogue


class Excluded(NamedTuple):
    """Items not used as negatives: the user's history and cold items. A target is never excluded."""

    seen_items: Tensor  # (B, L) the user's history, padded with 0
    owner: Tensor  # (M,) the sequence, 0 .. B - 1, of each position
    cold_items: Tensor  # (n,) items held out of training


def rows(table, ids: Tensor) -> Tensor:
    """The vectors (..., D) of item ids (...); id 0 is padding."""
    return F.embedding(ids, table, padding_idx=0) if isinstance(table, Tensor) else table(ids)


def score_items(hidden: Tensor, table) -> Tensor:
    """User vectors (B, D) -> scores (B, V) of all items, which are dot products."""
    return hidden @ table.T if isinstance(table, Tensor) else table.scores(hidden)


def exclude_negatives(negatives: Tensor, targets: Tensor, excluded: Excluded | None) -> Tensor:
    """Distinct negatives (N,), targets (M,) -> bool (M, N): True where one is the target or excluded."""
    if excluded is None:
        return negatives == targets[:, None]
    # Binary search in the N negatives: a (B, V) mask, or comparing all L x N pairs, would cost far more.
    ordered, order = negatives.sort()
    place = torch.searchsorted(ordered, excluded.seen_items).clamp(max=len(negatives) - 1)  # (B, L)
    found = ordered[place] == excluded.seen_items
    columns = order[place].masked_fill(~found, len(negatives))  # (B, L); misses go to column N, cut off below
    seen = torch.isin(negatives, excluded.cold_items)  # (N,)
    seen = F.pad(seen, (0, 1)).repeat(len(place), 1).scatter_(1, columns, True)[:, :-1]  # (B, N)
    return seen[excluded.owner] | (negatives == targets[:, None])


def score(hidden, table, targets, negatives, excluded) -> tuple[Tensor, Tensor]:
    """Scores of targets (M,) and of negatives (M, N). Excluded negatives score -inf, which costs nothing."""
    positive = (hidden * rows(table, targets)).sum(-1)  # (M,)
    others = rows(table, negatives)  # (N, D) or (M, N, D)
    negative = hidden @ others.T if others.dim() == 2 else (others @ hidden[:, :, None])[:, :, 0]  # (M, N)
    if excluded is not None:
        negative = negative.masked_fill(excluded, -torch.inf)
    return positive, negative


def classify(hidden, table, targets, negatives, excluded) -> tuple[Tensor, Tensor]:
    """Binary cross entropies -log s(r+) of targets (M,) and -log(1 - s(r-)) of negatives (M, N), in nats;
    s is the sigmoid.

    Logits r are scores - log N, so that a score of 0, the mean of an untrained model, gives the target
    the probability 1 / (1 + N). The shift is 0 for N = 1, and the same for all items, so ranks do not change.
    (Noise-contrastive estimation, Gutmann & Hyvarinen 2010, eq. 4, with uniform noise.)"""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    shift = math.log(negative.shape[1])
    return F.softplus(shift - positive), F.softplus(negative - shift)


def bce(hidden, table, targets, negatives, excluded=None) -> Tensor:
    """Binary cross entropy of SASRec (arXiv 1808.09781, section III.D): -log s(r+) - sum log(1 - s(r-))."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    return positive.sum() + negative.sum()


def gbce(hidden, table, targets, negatives, excluded=None, t=0.75) -> Tensor:
    """Generalised BCE of gSASRec (arXiv 2308.07192, eq. 10 and 14): s(r+) to the power beta, which corrects
    the overconfidence due to sampled negatives. `t` is the calibration; t = 0 is plain BCE."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    alpha = min(1.0, negative.shape[1] / (len(table) - 2))  # sampling rate: N of V - 2 non-targets
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    return beta * positive.sum() + negative.sum()


def sampled_softmax(hidden, table, targets, negatives, excluded=None) -> Tensor:
    """Cross entropy over the target and its negatives. Drawn uniformly, they need no logQ correction."""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    scores = torch.cat([positive[:, None], negative], dim=1)  # (M, 1 + N)
    return (scores.logsumexp(1) - positive).sum()


def softmax(hidden, table, targets, negatives=None, excluded: Excluded | None = None) -> Tensor:
    """Cross entropy over all items but those `excluded` (row 0, padding, is not an item). Excluding
    the user's history matches the evaluation, where seen items are not ranked either."""
    if not isinstance(table, Tensor):
        return table.softmax(hidden, targets, excluded)
    return ChunkedSoftmax.apply(hidden, table, targets, *(excluded or (None, None, None)))


def weigh(
    scores: Tensor, target: Tensor, seen_items: Tensor | None, cold_items: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (m, V), overwritten, and target (m, 1) -> (sum of the losses, unnormalised probabilities (m, V),
    their sum over items (m, 1)). seen_items (m, L) and cold_items (n,) are left out, if given."""
    wanted = scores.gather(1, target)
    if seen_items is not None:  # write at few ids: a (B, V) mask would take a pass over all scores
        scores.scatter_(1, seen_items, -torch.inf)
        scores.index_fill_(1, cold_items, -torch.inf)
    scores[:, 0] = -torch.inf
    scores.scatter_(1, target, wanted)  # a target is never excluded
    top = scores.amax(1, keepdim=True)  # subtracted, so that exp() cannot overflow
    weights = scores.sub_(top).exp_()
    mass = weights.sum(1, keepdim=True)
    return (top + mass.log() - wanted).sum(), weights, mass


class ChunkedSoftmax(torch.autograd.Function):
    """`softmax` and its gradients in one pass over chunks of positions, so the (M, V) scores are never held.
    torch's linear_cross_entropy does the same, but cannot exclude other items per sequence."""

    @staticmethod
    def forward(ctx, hidden, table, targets, seen_items, owner, cold_items) -> Tensor:
        total = hidden.new_zeros(())
        grad_hidden = torch.empty_like(hidden)
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None  # None: a frozen table
        size = max(CHUNK_POSITIONS, CHUNK_SCORES[hidden.device.type] // len(table))
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            h, target = hidden[part], targets[part, None]  # (m, D), (m, 1)
            seen = None if seen_items is None else seen_items[owner[part]]
            loss, weights, mass = weigh(h @ table.T, target, seen, cold_items)
            total += loss
            # d loss / d scores = softmax - one-hot: the first term here, the second after the loop.
            grad_hidden[part] = weights @ table / mass
            if grad_table is not None:
                grad_table.addmm_(weights.T, h / mass)
        grad_hidden -= F.embedding(targets, table)
        if grad_table is not None:
            grad_table.index_add_(0, targets, hidden, alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_table)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple:
        grad_hidden, grad_table = ctx.saved_tensors
        grad_table = None if grad_table is None else grad_table.mul_(grad_total)
        return grad_hidden * grad_total, grad_table, None, None, None, None


LOSSES = {"bce": bce, "gbce": gbce, "sampled_softmax": sampled_softmax, "softmax": softmax}
NEEDS_NO_NEGATIVES = {"softmax"}
