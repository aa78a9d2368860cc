"""What is read off the hidden states besides item scores: labels of impressions, the time to the next action.

The time is a mixture of log-normal distributions (arXiv 1909.12127, section 3.2). All is in terms of
z = log(1 + gap + u), gap in seconds. Clocks count whole seconds and a gap of 0 is the most frequent one; on
such an atom a density would grow without bound. So a gap is spread over its second by an even u in 0 .. 1
(uniform dequantisation, arXiv 1511.01844, section 3.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.nn.layers import ZeroLinear

TIME_WEIGHT = 0.1  # of the next-time loss beside that of the items
COMPONENTS = 16
LONGEST = 16.0  # in z: some hundred days; the means of the components begin spread evenly up to here
NARROWEST = 0.05  # least scale of a component, in z
GOLDEN = (math.sqrt(5) - 1) / 2
TIME_ERRORS = [
    f"time_{error}{forecast}" for error in ("NLL", "MAE") for forecast in ("", "_last_gap", "_user_mean")
]


class CTRHead(nn.Module):
    """The logit of a positive action, from what the blocks made of the candidate."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.hidden = nn.Linear(cfg.dim, cfg.dim)
        self.logit = ZeroLinear(cfg.dim, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, D) -> (B, C)"""
        return self.logit(F.silu(self.hidden(hidden)))[..., 0]


def ctr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits and labels (B, C), -1 where there is no candidate -> the SUM of the binary cross entropy over
    the M candidates, a scalar"""
    shown = labels >= 0
    return F.binary_cross_entropy_with_logits(logits[shown], labels[shown].float(), reduction="sum")


def log_time(gaps: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Seconds (M,) -> z (M,) float32. Their u are those of `numbers` (M,), else of 0, 1, ..., in the sequence
    of the golden ratio: even, and always the same."""
    numbers = torch.arange(len(gaps), device=gaps.device) if numbers is None else numbers
    u = (1 + numbers.double()) * GOLDEN % 1
    return (1 + gaps.clamp(min=0) + u).log().float()


class TimeHead(nn.Module):
    """The distribution of z after each position."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.linear = ZeroLinear(cfg.dim, 3 * COMPONENTS)
        with torch.no_grad():  # the same mixture for all, at first
            weights, means, scales = self.linear.bias.chunk(3)
            weights.zero_()
            means.copy_(torch.linspace(0, LONGEST, COMPONENTS))
            scales.fill_(math.log(math.expm1(LONGEST / COMPONENTS)))  # softplus of it: neighbours overlap

    def mixture(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (M, D) -> logarithms of the weights, means and scales of z, each (M, COMPONENTS)"""
        weights, means, scales = self.linear(hidden).chunk(3, dim=-1)
        return weights.log_softmax(-1), means, NARROWEST + F.softplus(scales)

    def forward(self, hidden: Tensor, z: Tensor) -> Tensor:
        """hidden (M, D) and z (M,) of the next action -> -log p(z) in nats (M,)"""
        weights, means, scales = self.mixture(hidden)
        errors = (z[:, None] - means) / scales  # (M, COMPONENTS)
        densities = weights - scales.log() - errors.square() / 2 - math.log(2 * math.pi) / 2
        return -densities.logsumexp(-1)

    def median(self, hidden: Tensor) -> Tensor:
        """hidden (M, D) -> the median of z (M,), which has the least mean absolute error; by bisection"""
        weights, means, scales = self.mixture(hidden)
        low = (means - 8 * scales).amin(-1)
        high = (means + 8 * scales).amax(-1)
        for _ in range(40):
            middle = (low + high) / 2
            below = (weights.exp() * torch.special.ndtr((middle[:, None] - means) / scales)).sum(-1) < 0.5
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def time_errors(head: TimeHead, hidden: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"time_NLL": (B,), "time_MAE": (B,)}: NLL in nats and absolute error of z of the gap between the last
    action of each row and its target."""
    z = last_gap(batch)
    return {"time_NLL": head(hidden, z), "time_MAE": (z - head.median(hidden)).abs()}


def last_gap(batch: dict[str, Tensor]) -> Tensor:
    """(B,) z of the gap between the last action of each row and what follows it."""
    gaps = batch["next_timestamps"] - batch["timestamps"]
    return log_time(gaps.gather(1, batch["lengths"][:, None] - 1)[:, 0], batch["user_ids"])


def forecast_errors(batch: dict[str, Tensor], spread: dict[str, float]) -> dict[str, Tensor]:
    """The same of two forecasts without learning, a normal distribution of z around the gap before and
    around the mean of the user's gaps: {"time_NLL_last_gap": (B,), ...}. `spread`: their scales in the
    training data, and the mean of z for users with a single action (reclm.data.dataset.gap_statistics)."""
    last, times, z = batch["lengths"][:, None] - 1, batch["timestamps"], last_gap(batch)
    known = torch.arange(times.shape[1] - 1, device=times.device) < last  # (B, T - 1)
    past = times.diff(dim=1).clamp(min=0)
    past = (1 + past + 0.5).log().float() * known  # half a second: the mean of u
    before = F.pad(past, (1, 0)).gather(1, last)[:, 0]
    mean = past.sum(1) / known.sum(1).clamp(min=1)
    errors = {}
    for name, forecast in (("last_gap", before), ("user_mean", mean)):
        error = z - torch.where(known.any(1), forecast, spread["mean"])
        normal = torch.distributions.Normal(0.0, spread[name])
        errors[f"time_NLL_{name}"] = -normal.log_prob(error)
        errors[f"time_MAE_{name}"] = error.abs()
    return errors
