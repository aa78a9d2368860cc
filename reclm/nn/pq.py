"""An item table of shared sub-vectors, trained with the model: RecJPQ (arXiv 2312.06165), --item_table=pq.

Item i has m codes, code_ij in 0 .. k - 1, and its vector is the concatenation of m sub-vectors of width
D / m: number code_ij of sub-table j. The sub-vectors are trained; the codes are assigned before, by
`assign_codes` or, from a trained dense table, by `PQEmbedding.take`. Instead of D floats an item takes m
bytes, and a score is a sum of m numbers, of which there are m k per user vector, however many items there are
(PQTopK, arXiv 2408.09992):

    score_i = sum_j h_j . c_j[code_ij]

Nothing here has the shape (V, D) but the result of `dense`, which exports alone ask for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.data.dataset import Dataset
from reclm.errors import UserError
from reclm.nn.losses import Excluded, weigh

MOST_CENTROIDS = 256  # a code is one byte
ITEMS_PER_CENTROID = 16  # at least, unless --pq_centroids says otherwise
ITEMS_AT_ONCE = 2**12  # whose scores are summed at a time
POSITIONS_AT_ONCE = 128  # of the softmax, whose scores of all items are held at a time
OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised SVD
CLUSTERED, LLOYD_STEPS = 2**16, 25  # rows of k-means at most, and its iterations


def choose_centroids(cfg: ModelConfig, num_items: int) -> int:
    """k. Raises UserError if it is larger than the catalogue."""
    if cfg.pq_centroids > num_items:
        raise UserError(f"--pq_centroids={cfg.pq_centroids} is more than the {num_items:,} items: use fewer")
    fitting = max(2, num_items // ITEMS_PER_CENTROID)
    return cfg.pq_centroids or min(MOST_CENTROIDS, 2 ** (fitting.bit_length() - 1))


class PQEmbedding(nn.Embedding):
    """`weight` (m k, D / m) holds the sub-vectors, of sub-table j from row j k on; `codes` (V, m) uint8 are
    part of the state, so that a checkpoint needs no data. Item 0, padding, is the zero vector."""

    def __init__(self, num_rows: int, cfg: ModelConfig):
        self.num_codes, self.num_centroids = cfg.pq_codes, choose_centroids(cfg, num_rows - 1)
        super().__init__(self.num_codes * self.num_centroids, cfg.dim // cfg.pq_codes)
        self.register_buffer("codes", torch.zeros(num_rows, self.num_codes, dtype=torch.uint8))
        first = torch.arange(self.num_codes, dtype=torch.int32) * self.num_centroids
        self.register_buffer("first", first, persistent=False)  # (m,): the first row of each sub-table

    def __len__(self) -> int:  # V
        return len(self.codes)

    def forward(self, ids: Tensor) -> Tensor:
        """Item ids (...) -> their vectors (..., D)"""
        return self.concatenate(self.codes[ids]) * (ids != 0)[..., None]

    def concatenate(self, codes: Tensor) -> Tensor:
        """(..., m) -> (..., D)"""
        return F.embedding(codes + self.first, self.weight).flatten(-2)

    def table(self) -> "PQEmbedding":
        return self

    def dense(self) -> Tensor:
        """(V, D): the vectors of all items"""
        return F.pad(self.concatenate(self.codes[1:]), (0, 0, 1, 0))

    def sub_tables(self) -> Tensor:
        """(m, k, D / m)"""
        return self.weight.unflatten(0, (self.num_codes, self.num_centroids))

    def sub_scores(self, hidden: Tensor) -> Tensor:
        """User vectors (B, D) -> (m k, B): products of their parts with the sub-vectors"""
        parts = hidden.unflatten(1, (self.num_codes, -1)).permute(1, 2, 0)  # (m, D / m, B)
        return (self.sub_tables() @ parts).flatten(0, 1)

    def scores(self, hidden: Tensor) -> Tensor:
        """User vectors (B, D) -> scores (B, V) of all items; that of padding is 0"""
        sub_scores = self.sub_scores(hidden)
        scores = hidden.new_empty(len(hidden), len(self))
        for i in range(0, len(self), ITEMS_AT_ONCE):
            rows = self.codes[i : i + ITEMS_AT_ONCE] + self.first  # (v, m)
            scores[:, i : i + ITEMS_AT_ONCE] = F.embedding_bag(rows, sub_scores, mode="sum").T
        scores[:, 0] = 0.0
        return scores

    def take(self, table: Tensor, seed: int) -> dict[str, Tensor]:
        """State of this module that is close to a dense table (V, D): in each sub-table the centroids of
        k-means are the sub-vectors, and an item has the code of the nearest."""
        generator = torch.Generator().manual_seed(seed)
        codes, centroids = torch.zeros_like(self.codes, device="cpu"), []
        for j, rows in enumerate(table.cpu()[1:].chunk(self.num_codes, dim=1)):
            centroids.append(find_centroids(rows, self.num_centroids, generator))
            codes[1:, j] = nearest(rows, centroids[-1])
        return {"weight": torch.cat(centroids), "codes": codes}

    def softmax(self, hidden: Tensor, targets: Tensor, excluded: Excluded | None) -> Tensor:
        """The loss of reclm.nn.losses.softmax with this table."""
        return PQSoftmax.apply(hidden, self.weight, self, targets, *(excluded or (None, None, None)))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """torch's, but codes of no sub-vector are errors: they would be read from another's memory."""
        codes = state_dict.get(f"{prefix}codes")
        # As int, since a tensor of uint8 takes 256 for 0.
        least, most = (int(codes.min()), int(codes.max())) if codes is not None and codes.numel() else (0, 0)
        if least < 0 or most >= self.num_centroids:
            errors.append(f"codes are not below {self.num_centroids}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class PQSoftmax(torch.autograd.Function):
    """Softmax loss and its gradients in one pass over chunks of positions, as ChunkedSoftmax, with scores and
    gradients that are sums over codes: an item has a bag of m sub-scores, a sub-score a bag of items."""

    @staticmethod
    def forward(ctx, hidden, weight, table, targets, seen_items, owner, cold_items) -> Tensor:
        total, m = hidden.new_zeros(()), table.num_codes
        rows = table.codes + table.first  # (V, m)
        order = rows.T.flatten().sort(stable=True)
        items = order.indices.int() % len(rows)  # (m V,): those of each sub-vector, one after the other
        starts = torch.arange(len(weight), dtype=torch.int32, device=rows.device)
        starts = torch.searchsorted(order.values, starts, out_int32=True)  # (m k,)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(table.sub_tables())
        for i in range(0, len(hidden), POSITIONS_AT_ONCE):
            part = slice(i, i + POSITIONS_AT_ONCE)
            target = targets[part, None]  # (p, 1)
            seen = None if seen_items is None else seen_items[owner[part]]
            scores = F.embedding_bag(rows, table.sub_scores(hidden[part]), mode="sum").T  # (p, V)
            loss, weights, mass = weigh(scores, target, seen, cold_items)
            total += loss
            grad_scores = weights.div_(mass)
            grad_scores.scatter_add_(1, target, grad_scores.new_full(target.shape, -1.0))  # minus one-hot
            grad = F.embedding_bag(items, grad_scores.T, starts, mode="sum")  # (m k, p)
            grad = grad.unflatten(0, (m, -1))
            grad_hidden[part] = (grad.mT @ table.sub_tables()).transpose(0, 1).flatten(1)
            grad_weight += grad @ hidden[part].unflatten(1, (m, -1)).transpose(0, 1)  # (m, k, D / m)
        ctx.save_for_backward(grad_hidden, grad_weight.flatten(0, 1))
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, *[None] * 5


# ---------------------------------------------------------------- codes


def assign_codes(dataset: Dataset, cfg: ModelConfig, seed: int) -> Tensor:
    """(V, m) uint8 codes, from the training rows of a dataset alone (RecJPQ, section 4.1, "truncated SVD"):
    code j of an item is the quantile, one of k, of its j-th factor in an SVD of who used what. So items that
    the same people use share codes, and all sub-vectors of a sub-table have equally many items.

    Equal factors are ordered at random. An item without a training row has no factors; its codes are those of
    factors of 0, as rare items have: nothing tells such items apart, so their vectors are the same. Raises
    UserError if there are fewer users or items than codes."""
    num_items, k = dataset.num_items, choose_centroids(cfg, dataset.num_items)
    if cfg.pq_codes > min(dataset.num_users, num_items):
        raise UserError(f"--pq_codes={cfg.pq_codes} needs as many users and as many items: use fewer codes")
    generator = torch.Generator().manual_seed(seed)
    users, items = (torch.from_numpy(rows[dataset.in_training]) for rows in (dataset.owner, dataset.item_ids))
    size = (dataset.num_users, num_items + 1)
    factors = item_factors(torch.stack([users, items]), size, cfg.pq_codes, generator)  # (V, m)
    used = items.unique()
    used = used[torch.randperm(len(used), generator=generator)]
    quantiles = (torch.arange(len(used)) * k // len(used)).to(torch.uint8)
    codes = torch.zeros(num_items + 1, cfg.pq_codes, dtype=torch.uint8)
    for j in range(cfg.pq_codes):
        values, order = factors[used, j].sort(stable=True)
        of_zero = torch.searchsorted(values, 0.0).clamp(max=len(used) - 1)
        codes[1:, j] = quantiles[of_zero]
        codes[used[order], j] = quantiles
    return codes


def find_centroids(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """(n, d) -> (k, d) by Lloyd's algorithm from k of the rows, on at most CLUSTERED of them."""
    rows = rows[torch.randperm(len(rows), generator=generator)[: max(CLUSTERED, k)]]
    centroids = rows[:k].clone()
    for _ in range(LLOYD_STEPS):
        codes = nearest(rows, centroids)
        sizes = codes.bincount(minlength=k)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, codes, rows)
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)  # those of no row stay
    return centroids


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """(n, d), (k, d) -> (n,) the number of the nearest centroid of each row"""
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in rows.split(ITEMS_AT_ONCE)])


def item_factors(index: Tensor, size: tuple[int, int], rank: int, generator: torch.Generator) -> Tensor:
    """index (2, n) of the ones of a sparse matrix, `size` (U, V) -> its first `rank` right singular vectors,
    (V, rank), by subspace iteration from a random start (arXiv 0909.4061, algorithm 4.4). The matrix is held
    twice, and rank + 8 numbers per user and per item."""
    pairs = (index[0] * size[1] + index[1]).unique()  # somebody who comes back to an item counts once
    index = torch.stack([pairs // size[1], pairs % size[1]])
    matrix = torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), size, check_invariants=True)
    basis = torch.randn(size[0], min(rank + OVERSAMPLING, *size), generator=generator)
    for _ in range(ITERATIONS):  # of the users, whose number is usually smaller
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q  # (U, rank + 8)
    image = matrix.T @ basis  # (V, rank + 8)
    largest = torch.linalg.eigh(image.T @ image).eigenvectors.flip(1)[:, :rank]
    return F.normalize(image @ largest, dim=0)
