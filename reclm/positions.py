"""How far a user's history has come."""

from torch import Tensor, nn

from reclm.config import ModelConfig

NUM_BUCKETS = 100  # the last one starts at e ** 9.9, some 20,000 actions
BUCKET_WIDTH = 0.1  # in the natural logarithm of 1 + actions: up to the tenth each has its own


class PositionEmbedding(nn.Module):
    """A learned vector for the number of actions before this one, on a logarithmic scale: added to the item
    embedding. Rotary positions are distances within the last max_len actions; this tells a user's first
    session from the hundredth, and counts from the beginning of the WHOLE history, wherever it is cut."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(NUM_BUCKETS, cfg.dim)

    def forward(self, before: Tensor) -> Tensor:
        """Number of the user's actions before each token (B, S) -> (B, S, D)"""
        return self.embedding(before.float().log1p().div(BUCKET_WIDTH).int().clamp(max=NUM_BUCKETS - 1))
