"""The scores of all items, and the best k of them, exactly."""

import numpy as np

IN_CACHE = 2**23  # bytes: larger tables are read from memory, or nearly, for each product
FEW = 4  # persons


def score_items(hidden: np.ndarray, table: np.ndarray) -> np.ndarray:
    """User embeddings (B, D) and item factors (V, D), float32 -> scores (B, V), their dot products"""
    if len(hidden) <= FEW and table.nbytes > IN_CACHE:
        # One dot product per item is as fast as reading the table (scripts/bench/serve.py); the matrix
        # product of BLAS takes longer.
        return np.vecdot(table, hidden[:, None])
    return hidden @ table.T


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Scores (V,) -> the indices of the k best finite ones, best first, of equal ones the lower index first;
    fewer where fewer are finite. Items that may not be recommended have the score -inf."""
    found = np.flatnonzero(scores >= lower_bound(scores, k))
    found = found[scores[found] > -np.inf]
    return found[np.argsort(-scores[found], kind="stable")[:k]]


def lower_bound(scores: np.ndarray, k: int) -> float:
    """A number that at least k of the scores (V,) reach, and few more do."""
    stripes = int(len(scores) ** 0.5)  # stripe i has the scores i, i + stripes, i + 2 stripes, ...
    if stripes >= 4 * k:
        # The k best stripes have an item each that reaches the bound. Their maxima are found in one pass over
        # the scores, where np.partition of all would take several.
        scores = scores[: len(scores) // stripes * stripes].reshape(-1, stripes).max(0)
    return np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
