"""Communication between the processes that hold parts of one item table (reclm/nn/dealt.py)."""

import torch
import torch.distributed as dist
from torch import Tensor

from reclm.run import dist as processes


class Exchange:
    """The item table is dealt among ALL processes; those of one tensor-parallel group read the same batch, so
    `shares` of them read different ones. All methods are collective, and do nothing in a run of one."""

    def __init__(self, shares: dist.ProcessGroup | None = None):
        """`shares` is the group of this process and the one of each other share; None if it is all."""
        self.rank, self.world = processes.rank(), processes.num_processes()
        self.share, self.shares, self.of_shares = processes.data_rank(), processes.data_world(), shares
        # A group of its own: its messages cannot meet those of DDP, which are sent at other times.
        self.group = dist.new_group() if self.world > 1 else None

    def __deepcopy__(self, memo) -> "Exchange":  # for --ema; a group cannot be copied
        return self

    def deal(self, values: Tensor, counts: list[int], back: list[int]) -> Tensor:
        """Rows of `values`, ordered by the process they go to, of which process p gets counts[p] -> the rows
        that this process gets from all, in the order of the processes; back[p] from p."""
        if self.world == 1:
            return values
        got = values.new_empty(sum(back), *values.shape[1:])
        dist.all_to_all_single(got, values.contiguous(), back, counts, group=self.group)
        return got

    def counts(self, counts: Tensor) -> list[int]:
        """(world,): how many rows go to each process -> how many come from each"""
        if self.world == 1:
            return counts.tolist()
        got = torch.empty_like(counts)
        dist.all_to_all_single(got, counts, group=self.group)
        return got.tolist()

    def to_main(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """The rows of each process, of which they have `sizes`, in the main process; [] elsewhere"""
        none = [0] * self.world
        main = self.rank == 0
        got = self.deal(x, [len(x), *none[1:]], sizes if main else none)
        return list(got.split(sizes)) if main else []

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place"""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all processes, in place"""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def from_shares(self, x: Tensor) -> list[Tensor]:
        """Those of each share of the data, of any number of rows"""
        if self.shares == 1:
            return [x]
        group = self.of_shares or self.group
        sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(self.shares)]
        dist.all_gather(sizes, torch.tensor([len(x)], device=x.device), group=group)
        most = int(max(sizes))
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])  # gloo gathers equal sizes alone
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
