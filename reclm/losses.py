"""Training objectives: pure functions of hidden states and the item table.

All take hidden (M, D), the item table (V, D), targets (M,), negatives (N,) shared by all positions
or (M, N), excluded (M, N) bool or None, and return the SUM over the M positions as a scalar; the
caller divides by the number of targets of all ranks. Padding has been dropped before.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions


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

    Logits are scores - log N, so that a score of 0 says "as likely as any other of the 1 + N", which is
    what a fresh model should say; with N = 1 the shift is 0. It is the same for all items: ranks do not
    see it. (Noise-contrastive estimation, Gutmann & Hyvarinen 2010, eq. 4, with uniform noise.)"""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    shift = math.log(negative.shape[1])
    return F.softplus(shift - positive), F.softplus(negative - shift)


def bce(hidden, table, targets, negatives, excluded=None, **_) -> Tensor:
    """Binary cross entropy of SASRec (arXiv 1808.09781, section III.D): -log s(r+) - sum log(1 - s(r-))."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    return positive.sum() + negative.sum()


def gbce(hidden, table, targets, negatives, excluded=None, t=0.75, **_) -> Tensor:
    """Generalised BCE of gSASRec (arXiv 2308.07192, eq. 10 and 14): s(r+) to the power beta, which undoes
    the overconfidence that sampling negatives brings. t = 0 is plain BCE."""
    positive, negative = classify(hidden, table, targets, negatives, excluded)
    alpha = min(1.0, negative.shape[1] / (table.shape[0] - 2))  # sampling rate: N of V - 2 non-targets
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    return beta * positive.sum() + negative.sum()


def sampled_softmax(hidden, table, targets, negatives, excluded=None, **_) -> Tensor:
    """Cross entropy of the target among itself and the negatives (uniform draws need no correction)."""
    positive, negative = score(hidden, table, targets, negatives, excluded)
    scores = torch.cat([positive[:, None], negative], dim=1)  # (M, 1 + N)
    return (scores.logsumexp(1) - positive).sum()


def softmax(hidden, table, targets, negatives=None, excluded=None, **_) -> Tensor:
    """Cross entropy over the whole catalogue, 256 positions at a time: all (M, V) scores are never held."""
    # torch's own choice of chunk is a share of M: too small to be fast where M is.
    options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=256)
    # Row 0 is padding, not a candidate.
    return F.linear_cross_entropy(hidden, table[1:], targets - 1, reduction="sum", options=options)


LOSSES = {"bce": bce, "gbce": gbce, "sampled_softmax": sampled_softmax, "softmax": softmax}
