"""What a Recommender needs of a model, whatever runs it."""

from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A model in one runtime. Batches are those of `person.make_batch`."""

    table: np.ndarray  # (V, D) float32 item factors, or what is used like them: SmallTable, PQTable

    def hidden(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """(B, D) float32 user embeddings after the last action"""

    def start(self, batch: dict[str, np.ndarray]) -> tuple[Any, np.ndarray]:
        """(state of one person's history for `extend`, user embedding (D,))"""

    def extend(self, state: Any, batch: dict[str, np.ndarray]) -> np.ndarray | None:
        """Add one action, a batch (1, 1), in place -> user embedding (D,); None where the result would not be
        that of reading the last max_len actions again"""

    def probabilities(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """candidate_ids (B, C) after each history -> (B, C), of a positive action; --task=ctr only"""

    # With adapters also score_update(hidden, ids, items), see reclm/adapt/many.py.
