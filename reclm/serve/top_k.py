"""The best k of a row of scores, exactly."""

import numpy as np

BLOCK = 1024  # scores: a large row is searched block by block, and only the best blocks item by item


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Scores (V,) -> the indices of the k best finite ones, best first, of equal ones the lower index first;
    fewer where fewer are finite. Items that may not be recommended have the score -inf."""
    places = None
    if len(scores) > 2 * BLOCK * max(k, 8):
        whole = len(scores) // BLOCK * BLOCK
        best = scores[:whole].reshape(-1, BLOCK).max(1)
        bound = np.partition(best, -k)[-k]  # k blocks have an item of at least this score
        blocks = np.flatnonzero(best >= bound)
        places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        places = np.concatenate([places, np.arange(whole, len(scores))])
        scores = scores[places]
    if k < len(scores):
        bound = np.partition(scores, -k)[-k]
        found = np.flatnonzero(scores >= bound)
    else:
        found = np.arange(len(scores))
    found = found[np.argsort(-scores[found], kind="stable")][:k]
    found = found[scores[found] > -np.inf]
    return found if places is None else places[found]
