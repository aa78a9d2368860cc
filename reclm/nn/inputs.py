"""Input rows: turn the actions of a batch into the tokens that the blocks see, and items into the item table.

    <profile> <profile> ...  <weekday> <hour> <item>  <gap> <item>  <weekday> <hour> <gap> <item> ...

Token ids form one vocabulary: 0 is padding, 1 .. V - 1 are items, then come profile tokens (one range per
field, whose first id is "unknown") and time tokens: the gap since the previous action (in log-scale buckets),
and at the start of a session its weekday and hour (UTC). Only items are ranked and predicted. Per action, one
position predicts the next item: its own, or with `request_time` that of the last time token before it."""

import numpy as np
import torch
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.nn.layers import (
    TIME_BUCKETS,
    PositionEmbedding,
    Table,
    TimeEmbedding,
    ZeroEmbedding,
    ZeroEmbeddingBag,
    ZeroLinear,
    log_buckets,
)
from reclm.nn.losses import rows

PADDING = 0
SESSION = 3600.0  # seconds without an action after which a new session starts
GAPS, HOURS, WEEKDAYS = TIME_BUCKETS[0], 24, 7  # numbers of time tokens, in the order of their ids
TOKENS_PER_ACTION = 4  # at most: the item, then weekday, hour and gap of the next action


def calendar(times: Tensor) -> tuple[Tensor, Tensor]:
    """Seconds since 1970 (...) -> int64 weekday (0 = Monday) and hour in UTC, (...) each."""
    return (times // 86400 + 3).long() % WEEKDAYS, (times // 3600).long() % HOURS


class Inputs(nn.Module):
    """Lays out the tokens of a row and embeds each as a sum of token, position, time and code vectors."""

    def __init__(self, cfg: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.cfg = cfg
        self.num_rows = vocabulary.num_items + 1  # V
        sizes = vocabulary.profile_sizes
        self.first_time = self.num_rows + sum(sizes)
        first_profile = self.num_rows + np.cumsum([0, *sizes])[:-1]  # first token id per field
        self.register_buffer("first_profile", torch.from_numpy(first_profile), persistent=False)
        self.has_time_tokens = cfg.time_tokens == "tokens"
        num_tokens = sum(sizes) + (GAPS + HOURS + WEEKDAYS) * self.has_time_tokens
        self.token_embedding = nn.Embedding(num_tokens, cfg.dim) if num_tokens else None
        self.position_embedding = PositionEmbedding(cfg.dim) if cfg.position_embedding else None
        self.time_embedding = None
        if cfg.time_tokens == "embedding":
            self.time_embedding = TimeEmbedding(cfg.dim, cfg.request_time)
        self.code_embeddings = nn.ModuleDict(
            {name: ZeroEmbedding(size + 1, cfg.dim, PADDING) for name, size in vocabulary.code_sizes.items()}
        )

    @property
    def tokens_per_action(self) -> int:
        return TOKENS_PER_ACTION if self.has_time_tokens else 1

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row, with room for a candidate at its end."""
        return len(self.first_profile) + self.tokens_per_action * (self.cfg.max_len + 1)

    def forward(self, row: dict[str, Tensor], item_table: Table) -> Tensor:
        """A row from `lay_out` and the item table (V, D) -> token vectors (B, S, D)"""
        ids = row["token_ids"]
        if self.token_embedding is None:
            x = rows(item_table, ids)  # (B, S, D)
        else:  # two lookups, since one concatenated table would copy all items in every step
            other = ids >= self.num_rows
            x = rows(item_table, ids.masked_fill(other, PADDING))
            x = x + self.token_embedding((ids - self.num_rows).clamp(min=0)) * other[..., None]
        if self.position_embedding is not None:
            x = x + self.position_embedding(row["before"])
        if self.time_embedding is not None:
            x = x + self.time_embedding(row)
        for name, embedding in self.code_embeddings.items():
            x = x + embedding(row[name])
        return x

    def lay_out(self, batch: dict[str, Tensor], prefix: bool = True) -> tuple[dict, Tensor | None]:
        """A batch of T actions per sequence -> (row, queries): `queries` (B, T) is the index of the token
        whose output predicts the item after each action, None if it is the action's own.

        `row` has the batch's fields and, per token (B, S), token_ids and as needed codes, timestamps and
        next_timestamps, since_last and until_next (seconds), and `before`, the number of earlier actions.
        Without `prefix` there are no profile or time tokens before the first action."""
        ids = batch["item_ids"]  # (B, T)
        if self.token_embedding is None:
            row, queries, is_action = batch | {"token_ids": ids}, None, (ids != PADDING).long()
        else:
            row, queries, is_action = self.insert_tokens(batch, prefix)
        if self.position_embedding is not None:
            row["before"] = row["num_before"][:, None] + is_action.cumsum(1) - is_action
        if self.time_embedding is not None:
            times = row["timestamps"]
            row["since_last"] = times.diff(dim=1, prepend=times[:, :1])  # (B, S), 0 for the first token
            row["until_next"] = row["next_timestamps"] - times
        return row, queries

    def lay_out_candidates(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with C candidates per sequence -> one token per candidate, as the next action of its
        history: the fields of `lay_out` (B, C) and `positions` in the row. Its own feedback has code 0."""
        lengths = batch["history_lengths"]  # (B, C)
        row = {
            "token_ids": batch["candidate_ids"],
            "before": batch["num_before"][:, None] + lengths,
            "positions": len(self.first_profile) + lengths,
        }
        if "candidate_times" in batch:
            last = batch["timestamps"].gather(1, (lengths - 1).clamp(min=0))  # (B, C)
            row["timestamps"] = batch["candidate_times"]
            row["since_last"] = (batch["candidate_times"] - last) * (lengths > 0)
        for name in self.code_embeddings:
            row[name] = batch.get(f"candidate_{name}", torch.zeros_like(lengths))
        return row

    def insert_tokens(
        self, batch: dict[str, Tensor], prefix: bool
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """For `lay_out`: (row with profile and time tokens inserted, queries, int64 (B, S): 1 = an item)."""
        ids = batch["item_ids"]  # (B, T)
        first, body = [ids[:, :0]], [ids[..., None]]  # lists of (B, n) and of (B, T, n); 0 = no token
        if len(self.first_profile) and prefix:
            first.append(batch["profiles"] + self.first_profile)
        if self.has_time_tokens:
            if prefix:
                first.append(self.first_time + GAPS + self.calendar_tokens(batch["timestamps"][:, 0]))
            body.append(self.tokens_of_next(batch))
        first, body = torch.cat(first, dim=1), torch.cat(body, dim=2)
        width, step = first.shape[1], body.shape[2]
        slots = torch.cat([first, body.flatten(1)], dim=1)  # (B, P + T n)
        there = slots != PADDING
        positions = there.cumsum(1) - 1  # in the row; an empty slot has that of the last token before it
        size = int(positions[:, -1].max()) + 1
        target = positions.masked_fill(~there, size)

        def close_up(values: Tensor) -> Tensor:
            """Values per slot (B, P + T n) -> values per token (B, S), without empty slots"""
            return values.new_zeros(len(values), size + 1).scatter(1, target, values)[:, :size]

        def by_action(name: str, in_prefix: Tensor, of_next: Tensor) -> Tensor:
            """A batch field (B, T) -> (B, S): its value for items, `of_next` for time tokens after them"""
            values = of_next[..., None].repeat(1, 1, step)  # (B, T, n)
            values[..., 0] = batch[name]
            return close_up(torch.cat([in_prefix.expand(-1, width), values.flatten(1)], dim=1))

        is_item = torch.zeros_like(slots)
        is_item[:, width::step] = 1
        row = batch | {"token_ids": close_up(slots)}
        if "timestamps" in batch:  # a time token has the time of the action that it announces
            begin, after = batch["timestamps"][:, :1], batch["next_timestamps"]
            row["timestamps"] = by_action("timestamps", begin, after)
            row["next_timestamps"] = by_action("next_timestamps", begin, after)
        none = torch.zeros_like(ids)
        for name in self.code_embeddings:
            row[name] = by_action(name, none[:, :1], none)
        query = width + (step - 1 if self.cfg.request_time else 0)
        return row, positions[:, query::step], close_up(is_item)

    def calendar_tokens(self, times: Tensor) -> Tensor:
        """Seconds since 1970 (...) -> weekday and hour (..., 2), as offsets from the first hour token"""
        weekday, hour = calendar(times)
        return torch.stack([HOURS + weekday, hour], dim=-1)

    def tokens_of_next(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, 3): tokens for weekday, hour and gap of the action after each; 0 if unknown to the model"""
        times, after = batch["timestamps"], batch["next_timestamps"]
        gaps = after - times  # (B, T)
        session = (gaps >= SESSION)[..., None]
        dates = (self.first_time + GAPS + self.calendar_tokens(after)) * session  # (B, T, 2)
        tokens = torch.cat([dates, (self.first_time + log_buckets(gaps).long())[..., None]], dim=2)
        last = batch["lengths"] - (0 if self.cfg.request_time else 1)
        known = torch.arange(times.shape[1], device=times.device) < last[:, None]  # (B, T)
        return tokens * known[..., None]


class ItemContent(nn.Module):
    """Adds item content to the item table, gated by the id vector (as LiGR gates its branches):

        row = id + sum over features of sigmoid(W id) * content

    Content is the mean of trained word vectors, or a projection of frozen vectors (text, images); both start
    at 0. A cold item, whose id vector is 0, is represented by half its content, as sigmoid(0) = 1/2."""

    def __init__(self, cfg: ModelConfig, features: dict[str, np.ndarray]):
        super().__init__()
        self.id_dropout = cfg.id_dropout
        self.projections, self.gates = nn.ModuleList(), nn.ModuleList()
        for i, array in enumerate(features.values()):
            rows = torch.from_numpy(np.pad(array, ((1, 0), (0, 0))))  # (V, K or F): row 0 is padding
            self.register_buffer(f"rows_{i}", rows, persistent=False)
            if rows.is_floating_point():
                projection = ZeroLinear(rows.shape[1], cfg.dim, bias=False)
            else:
                size = int(rows.max()) + 1
                projection = ZeroEmbeddingBag(size, cfg.dim, mode="mean", padding_idx=PADDING)
            self.projections.append(projection)
            self.gates.append(ZeroLinear(cfg.dim, cfg.dim, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        """Id vectors (V, D) -> the item table (V, D). In training, the id vectors of a random share
        `id_dropout` of the items are zeroed (DropoutNet, NeurIPS 2017), as if they were cold."""
        if self.training and self.id_dropout:
            ids = ids * (torch.rand(len(ids), 1, device=ids.device) >= self.id_dropout)
        table = ids
        for i, (projection, gate) in enumerate(zip(self.projections, self.gates, strict=True)):
            content = projection(getattr(self, f"rows_{i}"))  # (V, D)
            table = table + torch.sigmoid(gate(ids)) * content
        return table
