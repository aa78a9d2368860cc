"""Time between actions, on a logarithmic scale."""

from torch import Tensor, nn

from reclm.config import ModelConfig

NUM_BUCKETS = 64  # the last one starts at e ** (63 * 0.3), some five years, in seconds
BUCKET_WIDTH = 0.3  # in the natural logarithm of 1 + seconds: 0, 1 and 2 seconds are apart


def log_buckets(seconds: Tensor) -> Tensor:
    """Seconds (...) -> bucket numbers (...) int32 in 0 .. NUM_BUCKETS - 1, finer the shorter the time (as
    HSTU does, arXiv 2402.17152). Negative times count as 0."""
    return seconds.float().clamp(min=0).log1p().div(BUCKET_WIDTH).clamp(max=NUM_BUCKETS - 1).int()


class TimeEmbedding(nn.Module):
    """A learned vector for the time since the action before, and with `request_time` one for the time until
    the next action, the one to predict: added to the item embedding of each action."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.since_last_embedding = nn.Embedding(NUM_BUCKETS, cfg.dim)
        self.until_next_embedding = nn.Embedding(NUM_BUCKETS, cfg.dim) if cfg.request_time else None

    def forward(self, row: dict[str, Tensor]) -> Tensor:
        """since_last, and with `request_time` until_next, (B, T) in seconds -> (B, T, D)"""
        x = self.since_last_embedding(log_buckets(row["since_last"]))
        if self.until_next_embedding is not None:
            x = x + self.until_next_embedding(log_buckets(row["until_next"]))
        return x
