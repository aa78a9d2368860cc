"""An item table dealt among processes, for catalogues that one of them cannot hold or should not update.

Item i, from 1, is row (i - 1) // W + 1 of process (i - 1) % W; row 0 of each is padding. A lookup asks for
each id once, by all-to-all, and gradients of the rows go back the same way. Scores of all items are computed
where their rows are, so each process needs the user vectors of all (`softmax`) or the same users (`scores`).

The gradient of a row is the mean over processes of what they sent, as DDP's is for other weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reclm.nn.layers import ItemEmbedding
from reclm.nn.losses import CHUNK_POSITIONS, CHUNK_SCORES, Excluded

ROWS_AT_ONCE = 2**16  # of initial values


class DealtEmbedding(ItemEmbedding):
    """This process's rows, weight (1 + n, D). `exchange` is a reclm.run.exchange.Exchange. With `sparse`
    gradients hold the rows that a step touched alone: its cost does not grow with the catalogue."""

    def __init__(self, num_rows: int, dim: int, padding_idx: int, exchange, sparse: bool = False):
        self.num_rows, self.exchange = num_rows, exchange
        here = len(range(exchange.rank, num_rows - 1, exchange.world))
        super().__init__(1 + here, dim, padding_idx=padding_idx, sparse=sparse)

    def reset_parameters(self) -> None:
        """Called by torch, which draws numbers here that `normal_` replaces later: as many as for a whole
        table, so that all other weights start alike."""
        self.normal_(1.0)

    def __len__(self) -> int:
        return self.num_rows

    def table(self) -> "DealtEmbedding":
        return self

    def local(self, ids: Tensor) -> Tensor:
        """Item ids (...) -> rows of this process, 0 for those that others hold"""
        place = ids - 1
        here = place % self.exchange.world == self.exchange.rank
        return (place // self.exchange.world + 1) * here

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the parts of the table, in place"""
        return self.exchange.sum(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Item ids (...) -> vectors (..., D)"""
        unique, inverse = ids.unique(return_inverse=True)
        return Rows.apply(self.weight, unique, self)[inverse]

    def scores(self, hidden: Tensor) -> Tensor:
        """User vectors (B, D), the same in every process -> scores (B, 1 + n) of this process's items"""
        return hidden @ self.weight.T

    def softmax(self, hidden: Tensor, targets: Tensor, excluded: Excluded | None) -> Tensor:
        """The loss of reclm.nn.losses.softmax with this table."""
        seen_items, owner, cold_items = excluded or (None, None, None)
        parts = self.exchange.from_shares(hidden.detach())
        sizes = [len(part) for part in parts]
        place = slice(sum(sizes[: self.exchange.share]), sum(sizes[: self.exchange.share + 1]))
        targets = torch.cat(self.exchange.from_shares(targets))
        if excluded is not None:
            excluded = Excluded(*self.seen_of_all(seen_items, owner), cold_items)
        return DealtSoftmax.apply(hidden, self.weight, self, place, torch.cat(parts), targets, excluded)

    def seen_of_all(self, seen_items: Tensor, owner: Tensor) -> list[Tensor]:
        """(B, L) and (M,) of this share -> those of all, padded to the longest"""
        longest = int(self.exchange.max(torch.tensor([seen_items.shape[1]], device=owner.device)))
        seen_items = F.pad(seen_items, (0, longest - seen_items.shape[1]))
        parts = self.exchange.from_shares(seen_items)
        first, owners = 0, []
        for part, of_part in zip(parts, self.exchange.from_shares(owner), strict=True):
            owners.append(of_part + first)
            first += len(part)
        return [torch.cat(parts), torch.cat(owners)]

    @torch.no_grad()
    def normal_(self, std: float) -> None:
        """The values that nn.init.normal_ would give the rows of a whole table, however many processes."""
        for first in range(0, self.num_rows, ROWS_AT_ONCE):
            rows = self.weight.new_empty(min(ROWS_AT_ONCE, self.num_rows - first), self.weight.shape[1])
            places = self.local(torch.arange(first, first + len(rows)))
            self.weight[places] = rows.normal_(std=std)  # others go to row 0, which is cleared later

    def part_of(self, values: Tensor) -> Tensor:
        """Values (V, ...) of all rows -> those (1 + n, ...) of this process's"""
        mine = values[self.exchange.rank + 1 :: self.exchange.world]
        return torch.cat([values[:1], mine])

    def gather(self, values: Tensor) -> Tensor:
        """The reverse, whole in the main process, with no rows elsewhere."""
        world = self.exchange.world
        sizes = [len(range(other, self.num_rows - 1, world)) for other in range(world)]
        parts = self.exchange.to_main(values[1:], sizes)
        whole = values.new_empty(self.num_rows if parts else 0, *values.shape[1:])
        whole[:1] = values[:1]
        for other, part in enumerate(parts):
            whole[other + 1 :: world] = part
        return whole

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """torch's, from the weight of a whole table (V, D)."""
        name = f"{prefix}weight"
        whole = state_dict.get(name)
        if whole is None:
            missing.append(name)
        elif whole.shape != (self.num_rows, self.weight.shape[1]):
            errors.append(f"{name} has the shape {tuple(whole.shape)}")
        else:
            with torch.no_grad():
                self.weight.copy_(self.part_of(whole))


class Rows(torch.autograd.Function):
    """Distinct ids (n,) -> their vectors (n, D), from the processes that hold them."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, table: DealtEmbedding) -> Tensor:
        exchange = table.exchange
        holder = (ids - 1) % exchange.world
        order = holder.argsort(stable=True)
        counts = torch.bincount(holder, minlength=exchange.world)
        ctx.table, ctx.order, ctx.counts, ctx.back = table, order, counts.tolist(), exchange.counts(counts)
        place = (ids[order] - 1) // exchange.world + 1  # of padding 0
        ctx.asked = exchange.deal(place, ctx.counts, ctx.back)
        got = exchange.deal(weight[ctx.asked], ctx.back, ctx.counts)
        return torch.empty_like(got).index_copy_(0, order, got)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        table, exchange = ctx.table, ctx.table.exchange
        grad = exchange.deal(grad[ctx.order], ctx.counts, ctx.back) / exchange.world
        grad[ctx.asked == 0] = 0.0  # padding stays 0
        if table.sparse:
            return torch.sparse_coo_tensor(ctx.asked[None], grad, table.weight.shape), None, None
        return torch.zeros_like(table.weight).index_add_(0, ctx.asked, grad), None, None


class DealtSoftmax(torch.autograd.Function):
    """Softmax loss over all items and its gradients in one pass over chunks of the positions of all shares,
    as ChunkedSoftmax. Returns the loss of this share's positions, `place`."""

    @staticmethod
    def forward(ctx, hidden, weight, table, place, everyone, targets, excluded: Excluded | None) -> Tensor:
        exchange, losses = table.exchange, hidden.new_empty(len(everyone))
        grad_hidden, grad_weight = torch.empty_like(everyone), torch.zeros_like(weight)
        rows = len(table) // exchange.world  # as every process counts them: chunks must be the same in all
        size = max(CHUNK_POSITIONS, CHUNK_SCORES[hidden.device.type] // max(1, rows))
        local = table.local(targets)[:, None]  # (M, 1)
        for first in range(0, len(everyone), size):
            part = slice(first, first + size)
            h, target = everyone[part], local[part]
            scores = h @ weight.T  # (m, 1 + n)
            wanted = scores.gather(1, target)
            if excluded is not None:
                seen = excluded.seen_items[excluded.owner[part]]
                scores.scatter_(1, table.local(seen), -torch.inf)
                scores.index_fill_(1, table.local(excluded.cold_items), -torch.inf)
            scores.scatter_(1, target, wanted)
            scores[:, 0] = -torch.inf
            top = exchange.max(scores.amax(1, keepdim=True))
            weights = scores.sub_(top).exp_()
            sums = torch.cat([weights.sum(1, keepdim=True), wanted * (target > 0)], dim=1)
            mass, wanted = exchange.sum(sums).split(1, dim=1)  # (m, 1) each
            losses[part] = (top + mass.log() - wanted)[:, 0]
            grad_hidden[part] = weights @ weight / mass
            grad_weight.addmm_(weights.T, h / mass)
        there = (local > 0).float()
        grad_hidden -= weight[local[:, 0]] * there
        grad_weight.index_add_(0, local[:, 0], everyone * there, alpha=-1)
        grad_weight[0] = 0.0
        ctx.save_for_backward(exchange.sum(grad_hidden)[place], grad_weight / exchange.shares)
        return losses[place].sum()

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight.mul_(grad_total), *[None] * 5
