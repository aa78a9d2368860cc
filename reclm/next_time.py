"""When the next action comes: a mixture of log-normal distributions (arXiv 1909.12127, section 3.2).

All is said of the logarithm of the time, z = log(1 + gap + u), gap in seconds. Clocks count whole seconds and
a gap of 0 is the most frequent one; on such an atom a density would grow without bound. So a gap is spread
over its second by an even u in 0 .. 1 (uniform dequantisation, arXiv 1511.01844, section 3.1)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig

COMPONENTS = 16
LONGEST = 16.0  # in z: some hundred days; the means of the components begin spread evenly up to here
NARROWEST = 0.05  # least scale of a component, in z
TIME_ERRORS = (
    "time_NLL", "time_NLL_last_gap", "time_NLL_user_mean",
    "time_MAE", "time_MAE_last_gap", "time_MAE_user_mean",
)  # fmt: skip
GOLDEN = (math.sqrt(5) - 1) / 2


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
        self.linear = nn.Linear(cfg.dim, 3 * COMPONENTS)
        with torch.no_grad():  # the weights begin at 0 (model.init_weights)
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


def time_errors(head: TimeHead, hidden: Tensor, batch: dict[str, Tensor], spread: dict) -> dict[str, Tensor]:
    """{name: (B,)} of the gap between the last action of each row and its target: NLL in nats and absolute
    error of z, of the head and of two forecasts with a normal distribution of z around them: the gap
    before, and the mean of the user's gaps. `spread`: their scales in the training data, and the mean of z
    for users with a single action."""
    last = batch["lengths"][:, None] - 1
    times = batch["timestamps"]
    gap = (batch["next_timestamps"] - times).gather(1, last)[:, 0]  # (B,)
    z = log_time(gap, batch["user_ids"])
    known = torch.arange(times.shape[1] - 1, device=times.device) < last  # (B, T - 1)
    past = times.diff(dim=1).clamp(min=0)
    past = (1 + past + 0.5).log().float() * known  # half a second: the mean of u
    before = F.pad(past, (1, 0)).gather(1, last)[:, 0]
    mean = past.sum(1) / known.sum(1).clamp(min=1)
    errors = {"time_NLL": head(hidden, z), "time_MAE": (z - head.median(hidden)).abs()}
    for name, forecast in (("last_gap", before), ("user_mean", mean)):
        error = z - torch.where(known.any(1), forecast, spread["mean"])
        normal = torch.distributions.Normal(0.0, spread[name])
        errors[f"time_NLL_{name}"] = -normal.log_prob(error)
        errors[f"time_MAE_{name}"] = error.abs()
    return errors


def training_spread(dataset) -> dict[str, float]:
    """The mean of z in the training data, and the root mean square error of the two forecasts of
    `time_errors` there."""
    owner = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    place = np.arange(len(owner)) - dataset.offsets[owner]
    inside = (place >= 1) & (place < dataset.train_lengths[owner])  # rows that end a gap of training
    z = np.log(1.5 + np.diff(dataset.timestamps, prepend=0.0).clip(min=0))
    count = np.bincount(owner[inside], minlength=dataset.num_users)
    means = np.bincount(owner[inside], z[inside], dataset.num_users) / count.clip(min=1)
    after_gap = inside & (place >= 2)
    last_gap = z[after_gap] - z[np.flatnonzero(after_gap) - 1]
    errors = {"last_gap": last_gap, "user_mean": z[inside] - means[owner[inside]]}
    spread = {name: math.sqrt(np.square(e).sum() / max(len(e), 1)) for name, e in errors.items()}
    mean = z[inside].sum() / max(inside.sum(), 1)  # 0 where no user has two training actions
    return {name: max(scale, NARROWEST) for name, scale in spread.items()} | {"mean": float(mean)}
