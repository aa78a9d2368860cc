"""Item factors that are codes, as Recommender uses them, without the array (V, D)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.errors import UserError
from reclm.nn.pq import PQEmbedding
from reclm.serve.top_k import FEW, top_k

MANY = 2**16  # items: from here on, tables of the sums of two sub-scores pay
BLOCK = 128  # items of which the best score is kept
ITEMS_AT_ONCE = 2**13  # whose scores, of all persons, should stay in the cache
LOOKED_UP = 2**16  # items whose sub-scores are looked up in one table before the next one


class SmallTable:
    """A quantized item table. Of the array (V, D) that it stands for: its length, its rows by number, and its
    products with user embeddings."""

    def __init__(self, items: nn.Module):
        self.items, self.device = items, items.codes.device

    def __len__(self) -> int:
        return len(self.items)

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @torch.inference_mode()
    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """Item numbers (...) -> (..., D)"""
        return self.items(torch.as_tensor(numbers, device=self.device)).cpu().numpy()

    @torch.inference_mode()
    def scores(self, hidden: np.ndarray) -> np.ndarray:
        """User embeddings (B, D) -> (B, V)"""
        return self.items.scores(self.to_device(hidden)).cpu().numpy()


class PQTable(SmallTable):
    """One of --item_table=pq, which also finds the best items without the scores of all."""

    def __init__(self, items: PQEmbedding):
        super().__init__(items)
        self.codes = items.codes.cpu().numpy()

    @torch.inference_mode()
    def scores(self, hidden: np.ndarray) -> np.ndarray:
        """User embeddings (B, D) -> (B, V)"""
        if len(hidden) > FEW or len(self) < MANY:
            return self.items.scores(self.to_device(hidden)).cpu().numpy()
        return np.stack([self.sum_pairs(one) for one in self.sub_scores(hidden)])

    def sub_scores(self, hidden: np.ndarray) -> np.ndarray:
        """(B, D) -> (B, m, k)"""
        found = self.items.sub_scores(self.to_device(hidden)).T.unflatten(1, (-1, self.items.num_centroids))
        return found.cpu().numpy()

    def sum_pairs(self, sub_scores: np.ndarray) -> np.ndarray:
        """(m, k) of one person -> scores (V,). Two codes are read as one number of 16 bits, an index into the
        sums of their sub-scores: half as many look-ups, in tables that the cache holds."""
        m, k = sub_scores.shape
        tables, indices = list(sub_scores[m - m % 2 :]), list(self.codes[:, m - m % 2 :].T)
        pairs = self.codes[:, : m - m % 2].view("<u2")  # (V, m / 2): code 2j + 256 code 2j + 1
        for j in range(m // 2):
            table = np.zeros((k, 256), np.float32)
            np.add(sub_scores[2 * j + 1][:, None], sub_scores[2 * j], out=table[:, :k])
            tables.append(table.ravel())
            indices.append(pairs[:, j])
        scores, part = np.zeros(len(self), np.float32), np.empty(LOOKED_UP, np.float32)
        for i in range(0, len(self), LOOKED_UP):
            total = scores[i : i + LOOKED_UP]
            for table, index in zip(tables, indices, strict=True):
                found = part[: len(total)]
                total += table.take(index[i : i + LOOKED_UP], out=found, mode="clip")  # the fastest mode
        scores[0] = 0.0
        return scores

    @torch.inference_mode()
    def best(
        self, hidden: np.ndarray, k: int, left_out: np.ndarray, seen: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """User embeddings (B, D) -> per person (item numbers, scores) of the k best items but those of
        `left_out` (n,), in order, and the person's own in `seen`; best first, of equal ones the lower number
        first.

        No (B, V) is made: scores are computed for some thousand items at a time, of which the best of each
        BLOCK is kept. The k best items are in blocks that reach the k-th best of these; only the items of
        such blocks are scored again. Raises UserError for non-finite scores."""
        sub_scores = self.items.sub_scores(self.to_device(hidden))  # (m k, B)
        if not sub_scores.sum().isfinite():
            raise UserError("the model gives non-finite scores: use another checkpoint")
        tops = self.best_of_blocks(sub_scores, left_out, seen).T.contiguous().cpu().numpy()  # (B, blocks)
        bounds = np.partition(tops, -min(k, tops.shape[1]))[:, -min(k, tops.shape[1])]  # (B,)
        found, allowed, numbers = [], np.zeros(len(self), np.float32), np.arange(BLOCK)
        allowed[left_out] = -np.inf
        for top, bound, own, items in zip(tops, bounds, self.sub_scores(hidden), seen, strict=True):
            blocks = np.flatnonzero((top >= bound) & (top > -np.inf))
            chosen = (blocks[:, None] * BLOCK + numbers).ravel()
            chosen = chosen[chosen < len(self)]
            before, allowed[items] = allowed[items], -np.inf
            scores = sum(table[codes] for table, codes in zip(own, self.codes[chosen].T, strict=True))
            scores += allowed[chosen]
            allowed[items] = before
            (order,) = top_k(scores[None], k)
            found.append((chosen[order], scores[order]))
        return found

    def best_of_blocks(self, sub_scores: Tensor, left_out: np.ndarray, seen: Sequence[np.ndarray]) -> Tensor:
        """(m k, B) -> (V / BLOCK, B), -inf where all items of a block are left out"""
        persons = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
        items = np.concatenate(seen)
        order = items.argsort()
        persons, items, tops = self.to_device(persons[order]), items[order], []
        for i in range(0, len(self), ITEMS_AT_ONCE):
            codes = self.items.codes[i : i + ITEMS_AT_ONCE]
            scores = F.embedding_bag(codes + self.items.first, sub_scores, mode="sum")  # (v, B)
            none, own = (
                slice(*np.searchsorted(numbers, [i, i + len(codes)])) for numbers in (left_out, items)
            )
            scores[self.to_device(left_out[none] - i)] = -torch.inf
            scores[self.to_device(items[own] - i), persons[own]] = -torch.inf
            if len(scores) % BLOCK:  # the last ones
                scores = F.pad(scores, (0, 0, 0, -len(scores) % BLOCK), value=-torch.inf)
            tops.append(scores.unflatten(0, (-1, BLOCK)).amax(1))
        return torch.cat(tops)
