"""Training objectives: pure functions of hidden states and the item table.

All take hidden (M, D), the item table (V, D), targets (M,), negatives (N,) shared by all positions
or (M, N), and `excluded`, and return the SUM over the M positions as a scalar; the caller divides by the
number of targets of all processes. Padding has been dropped before. `excluded` is a bool (M, N) of the
negatives that do not count, or for a loss without negatives an `Excluded`; None where nothing is.
Nothing here is of shape (B, V) or (M, V): there may be millions of items.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that `softmax` works on at once: 2 MiB stay in the cache of a CPU, a GPU wants large products.
CHUNK_SCORES = {"cpu": 2**19, "cuda": 2**27}
CHUNK_POSITIONS = 128  # at least, however large the catalogue


class Excluded(NamedTuple):
    """Items that a sequence is not compared with. The target always counts."""

    seen_items: Tensor  # (B, L) the user's history, padded with 0
    owner: Tensor  # (M,) the sequence of each position
    cold_items: Tensor  # (n,) items that are never trained


def exclude_negatives(negatives: Tensor, targets: Tensor, excluded: Excluded | None) -> Tensor:
    """Distinct negatives (N,), targets (M,) -> bool (M, N): the target itself, and what is `excluded`."""
    if excluded is None:
        return negatives == targets[:, None]
    ordered, order = negatives.sort()
    place = torch.searchsorted(ordered, excluded.seen_items).clamp(max=len(negatives) - 1)  # (B, L)
    found = ordered[place] == excluded.seen_items
    columns = order[place].masked_fill(~found, len(negatives))  # (B, L): the last column is for the others
    seen = torch.isin(negatives, excluded.cold_items)  # (N,)
    seen = F.pad(seen, (0, 1)).repeat(len(place), 1).scatter_(1, columns, True)[:, :-1]  # (B, N)
    return seen[excluded.owner] | (negatives == targets[:, None])


def score(hidden, table, targets, negatives, excluded) -> tuple[Tensor, Tensor]:
    """Scores of targets (M,) and negatives (M, N); excluded negatives are -inf: they cost nothing."""
    positive = (hidden * F.embedding(targets, table)).sum(-1)  # (M,)
    rows = F.embedding(negatives, table)  # (N, D) or (M, N, D)
    negative = hidden @ rows.T if rows.dim() == 2 else (rows @ hidden[:, :, None])[:, :, 0]  # (M, N)
    if excluded is not None:
        negative = negative.masked_fill(excluded, -torch.inf)
    return positive, negative


def classify(hidden, table, targets, negatives, excluded) -> tuple[Tensor, Tensor]:
    """Costs -log s(r+) (M,) and -log(1 - s(r-)) (M, N) of telling the target from N negatives.

    Logits are scores - log N, so that a score of 0 means "as likely as any other of the 1 + N", which is
    what a fresh model should predict; with N = 1 the shift is 0. It is the same for all items: ranks do not
    see it. (Noise-contrastive estimation, Gutmann & Hyvarinen 2010, eq. 4, with uniform noise.)"""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    shift = math.log(negative.shape[1])
    return F.softplus(shift - positive), F.softplus(negative - shift)


def bce(hidden, table, targets, negatives, excluded=None) -> Tensor:
    """Binary cross entropy of SASRec (arXiv 1808.09781, section III.D): -log s(r+) - sum log(1 - s(r-))."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    return positive.sum() + negative.sum()


def gbce(hidden, table, targets, negatives, excluded=None, t=0.75) -> Tensor:
    """Generalised BCE of gSASRec (arXiv 2308.07192, eq. 10 and 14): s(r+) to the power beta, which undoes
    the overconfidence that sampling negatives brings. t = 0 is plain BCE."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    alpha = min(1.0, negative.shape[1] / (table.shape[0] - 2))  # sampling rate: N of V - 2 non-targets
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    return beta * positive.sum() + negative.sum()


def sampled_softmax(hidden, table, targets, negatives, excluded=None) -> Tensor:
    """Cross entropy of the target among itself and the negatives (uniform draws need no correction)."""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    scores = torch.cat([positive[:, None], negative], dim=1)  # (M, 1 + N)
    return (scores.logsumexp(1) - positive).sum()


def softmax(hidden, table, targets, negatives=None, excluded: Excluded | None = None) -> Tensor:
    """Cross entropy over the whole catalogue, row 0 (padding) left out. Leaving out the user's history as
    well trains for what is ranked: seen items are no candidates there either."""
    return ChunkedSoftmax.apply(hidden, table, targets, *(excluded or (None, None, None)))


class ChunkedSoftmax(torch.autograd.Function):
    """The sum of `softmax` and its gradients in one pass, some positions at a time: the (M, V) scores are
    never held, as in torch's linear_cross_entropy, whose candidates are the same for all sequences."""

    @staticmethod
    def forward(ctx, hidden, table, targets, seen_items, owner, cold_items) -> Tensor:
        total = hidden.new_zeros(())
        grad_hidden, grad_table = torch.empty_like(hidden), torch.zeros_like(table)
        size = max(CHUNK_POSITIONS, CHUNK_SCORES[hidden.device.type] // len(table))
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            h, target = hidden[part], targets[part, None]  # (m, D), (m, 1)
            scores = h @ table.T  # (m, V)
            wanted = scores.gather(1, target)
            if seen_items is not None:  # the few ids: a (B, V) mask would cost a pass over all scores
                scores.scatter_(1, seen_items[owner[part]], -torch.inf)
                scores.index_fill_(1, cold_items, -torch.inf)
            scores[:, 0] = -torch.inf
            scores.scatter_(1, target, wanted)  # a target is never excluded
            top = scores.amax(1, keepdim=True)
            weights = scores.sub_(top).exp_()  # (m, V), probabilities but for their sum
            mass = weights.sum(1, keepdim=True)
            total += (top + mass.log() - wanted).sum()
            grad_hidden[part] = weights @ table / mass
            grad_table.addmm_(weights.T, h / mass)
        grad_hidden -= F.embedding(targets, table)
        grad_table.index_add_(0, targets, hidden, alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_table)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple:
        grad_hidden, grad_table = ctx.saved_tensors
        return grad_hidden * grad_total, grad_table.mul_(grad_total), None, None, None, None


LOSSES = {"bce": bce, "gbce": gbce, "sampled_softmax": sampled_softmax, "softmax": softmax}
NEEDS_NO_NEGATIVES = {"softmax"}
