"""Outputs besides item scores: the label of an impression (--task=ctr) and the time to the next action.

The time is classified: one bucket per second up to a minute, then buckets that grow geometrically. Within a
bucket all times are equally likely, so the probabilities define a density.

Errors are those of z = log(1 + gap + u), gap in seconds. Clocks count whole seconds and the most frequent gap
is 0, where a density could grow without bound; an even u in 0 .. 1 spreads each gap over its second (uniform
dequantisation, arXiv 1511.01844, section 3.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.draws import Draws
from reclm.nn.layers import Dropout, ZeroLinear

TIME_WEIGHT = 0.1  # of the loss of times, relative to that of the items
EXACT = 60  # gaps below this many seconds have a bucket per second
GROWTH = 1.25  # from there on, of the bounds of the buckets
LONGEST = 1e10  # seconds, three hundred years: the end of the last bucket
RECENT = 8  # gaps before, of which each is an input of its own
TIME_WIDTH = 128  # of the hidden layers of TimeHead
GOLDEN = (math.sqrt(5) - 1) / 2
TIME_ERRORS = ["time_NLL", "time_MAE"]


class CTRHead(nn.Module):
    """The logit of a positive action, from the hidden state of the candidate: a layer with SiLU, then one
    output."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.hidden = nn.Linear(cfg.dim, cfg.dim)
        self.logit = ZeroLinear(cfg.dim, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, D) -> (B, C)"""
        return self.logit(F.silu(self.hidden(hidden)))[..., 0]


def ctr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, C), labels (B, C), -1 for padding -> the SUM of the binary cross entropy over the M
    candidates, a scalar"""
    shown = labels >= 0
    return F.binary_cross_entropy_with_logits(logits[shown], labels[shown].float(), reduction="sum")


def time_bounds() -> Tensor:
    """(K + 1,) float64 seconds: bucket k holds the gaps from bounds[k] to below bounds[k + 1]."""
    count = math.ceil(math.log(LONGEST / EXACT) / math.log(GROWTH))
    growing = EXACT * GROWTH ** torch.arange(count + 1, dtype=torch.float64)
    return torch.cat([torch.arange(EXACT, dtype=torch.float64), growing.round()])


BOUNDS = time_bounds()
NUM_BUCKETS = len(BOUNDS) - 1  # K


def time_buckets(gaps: Tensor) -> Tensor:
    """Seconds (...) -> bucket numbers (...) int64; a negative gap, of a clock that went back, counts as 0."""
    inner = BOUNDS[1:-1].to(gaps.device)
    return torch.bucketize(gaps.clamp(min=0).contiguous(), inner, right=True)


def past_gaps(timestamps: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) seconds -> (codes (B, T, RECENT) int64, statistics (B, T, 3)) of the gaps up to each action.

    Codes: 1 + the bucket of each of the last gaps, 0 where there was none. Statistics: the mean of
    log(1 + gap), the share of gaps of 0 s, and the logarithm of 1 + the number of gaps."""
    gaps = timestamps.diff(dim=1).clamp(min=0)  # (B, T - 1)
    codes = F.pad(1 + time_buckets(gaps), (RECENT, 0)).unfold(1, RECENT, 1)
    number = torch.arange(timestamps.shape[1], device=timestamps.device)
    sums = torch.stack([gaps.log1p(), (gaps == 0).double()], dim=-1).cumsum(1)  # (B, T - 1, 2)
    means = F.pad(sums, (0, 0, 1, 0)) / number.clamp(min=1)[:, None]
    count = number.double().log1p().expand(timestamps.shape)[..., None]
    return codes, torch.cat([means, count], dim=-1).float()


class TimeHead(nn.Module):
    """The distribution of the time to the next action after each position: an MLP of the hidden state and of
    the gaps so far, with one output per bucket."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.of_hidden = nn.Linear(cfg.dim, TIME_WIDTH)
        self.of_recent = nn.EmbeddingBag(RECENT * (NUM_BUCKETS + 1), TIME_WIDTH, mode="sum")
        self.of_statistics = nn.Linear(3, TIME_WIDTH, bias=False)
        self.inner = nn.Linear(TIME_WIDTH, TIME_WIDTH)
        self.logits = ZeroLinear(TIME_WIDTH, NUM_BUCKETS)
        self.dropout = Dropout(cfg.dropout)

    def forward(
        self, hidden: Tensor, codes: Tensor, statistics: Tensor, draws: Draws | None = None
    ) -> Tensor:
        """hidden (M, D); codes (M, RECENT), statistics (M, 3) of `past_gaps` -> log-probabilities (M, K)"""
        places = torch.arange(RECENT, device=codes.device) * (NUM_BUCKETS + 1)
        x = self.of_hidden(hidden) + self.of_recent(codes + places) + self.of_statistics(statistics)
        x = self.inner(self.dropout(F.silu(x), draws))
        return self.logits(self.dropout(F.silu(x), draws)).log_softmax(-1)


def time_loss(head: TimeHead, hidden: Tensor, batch: dict[str, Tensor], valid: Tensor) -> Tensor:
    """hidden (M, D) at the M positions `valid` (B, T) -> the SUM over them of -log p(bucket of the gap to the
    next action), a scalar"""
    codes, statistics = past_gaps(batch["timestamps"])
    gaps = batch["next_timestamps"][valid] - batch["timestamps"][valid]
    probabilities = head(hidden, codes[valid], statistics[valid], Draws.of(batch).at(valid))
    return F.nll_loss(probabilities, time_buckets(gaps), reduction="sum")


def time_errors(head: TimeHead, hidden: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """hidden (B, D) after the last action of each row -> `distribution_errors` of the gap to its target, (B,)
    each"""
    rows, last = torch.arange(len(hidden), device=hidden.device), batch["lengths"] - 1
    codes, statistics = past_gaps(batch["timestamps"])
    gaps = (batch["next_timestamps"] - batch["timestamps"])[rows, last]
    probabilities = head(hidden, codes[rows, last], statistics[rows, last])
    return distribution_errors(probabilities, gaps, batch["user_ids"])


def distribution_errors(log_probabilities: Tensor, gaps: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """log_probabilities (M, K) of the buckets, gaps (M,) in seconds, numbers (M,) that choose each u ->
    {"time_NLL": (M,), "time_MAE": (M,)}: -log p(z) in nats, and |z - median of p|, the forecast with the
    least mean absolute error."""
    z, buckets = log_time(gaps, numbers), time_buckets(gaps)
    bounds = BOUNDS.to(gaps.device)
    density = log_probabilities.gather(1, buckets[:, None])[:, 0] - bounds.diff().log()[buckets]
    return {
        "time_NLL": -density - z,  # dz = dx / x with x = 1 + gap + u
        "time_MAE": (z - median(log_probabilities)).abs(),
    }


def log_time(gaps: Tensor, numbers: Tensor) -> Tensor:
    """Seconds (M,) -> z (M,) float64. The u of number n is the n-th of the golden-ratio sequence: evenly
    spread, and the same in every run."""
    return (1 + gaps.clamp(min=0) + (1 + numbers.double()) * GOLDEN % 1).log()


def median(log_probabilities: Tensor) -> Tensor:
    """(M, K) -> the median of z (M,)"""
    probabilities, bounds = log_probabilities.double().exp(), BOUNDS.to(log_probabilities.device)
    below = probabilities.cumsum(1)
    middle = (below < 0.5).sum(1, keepdim=True).clamp(max=NUM_BUCKETS - 1)  # (M, 1): the bucket that holds it
    mass = probabilities.gather(1, middle)
    share = (0.5 - below.gather(1, middle) + mass) / mass
    return (1 + bounds[middle] + share * bounds.diff()[middle]).log()[:, 0]
