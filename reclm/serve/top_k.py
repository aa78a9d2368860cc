"""The scores of all items, and the best k of them, exactly."""

import numpy as np

IN_CACHE = 2**23  # bytes: larger tables are read from memory, or nearly, for each product
FEW = 4  # persons


def score_items(hidden: np.ndarray, table: np.ndarray) -> np.ndarray:
    """User embeddings (B, D) and item factors (V, D), float32 -> scores (B, V), their dot products. A table
    that is no array (small_tables.SmallTable, PQTable) computes them itself."""
    if not isinstance(table, np.ndarray):
        return table.scores(hidden)
    if len(hidden) <= FEW and table.nbytes > IN_CACHE:
        # One dot product per item is as fast as reading the table (scripts/bench/serve.py); the matrix
        # product of BLAS takes longer.
        return np.vecdot(table, hidden[:, None])
    return hidden @ table.T


def top_k(scores: np.ndarray, k: int) -> list[np.ndarray]:
    """Scores (B, V) -> per row the indices of the k best finite ones, best first, of equal ones the lower
    index first; fewer where fewer are finite. Items that may not be recommended have the score -inf."""
    flat = np.flatnonzero(scores >= lower_bounds(scores, k))
    rows, found = np.divmod(flat, scores.shape[1])
    values = scores.ravel()[flat]
    order = np.lexsort((-values, rows))  # stable
    finite = np.bincount(rows, values > -np.inf, len(scores)).astype(int)
    ends = np.bincount(rows, minlength=len(scores)).cumsum()
    starts = ends - np.diff(ends, prepend=0)
    found = found[order]
    return [found[start : start + min(k, n)] for start, n in zip(starts, finite, strict=True)]


def lower_bounds(scores: np.ndarray, k: int) -> np.ndarray:
    """(B, V) -> (B, 1) numbers that at least k of a row's scores reach, and few more do."""
    size = scores.shape[1]
    stripes = int(size**0.5)  # stripe i has the scores i, i + stripes, i + 2 stripes, ...
    if stripes >= 4 * k:
        # The k best stripes have an item each that reaches the bound. Their maxima are found in one pass over
        # the scores, where np.partition of all would take several.
        scores = scores[:, : size // stripes * stripes].reshape(len(scores), -1, stripes).max(1)
    if k >= size:
        return np.full((len(scores), 1), -np.inf)
    return np.partition(scores, -k)[:, -k, None]
