"""What a user's row is: from the actions of a batch to the tokens that the blocks see.

    <profile> <profile> ...  <weekday> <hour> <item>  <gap> <item>  <weekday> <hour> <gap> <item> ...

One vocabulary, in ranges: 0 is padding, 1 .. V - 1 are items, behind them the profile tokens (a range for
each field, its first is "unknown") and the time tokens: the gap since the action before (on a logarithmic
scale), and where a session begins its weekday and hour (UTC). Only items are ever candidates, and only they
are targets: for each action there is one position whose output predicts the next item, the action's own, or
with `request_time` that of the last time token before the next item."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import ModelConfig
from reclm.intervals import NUM_BUCKETS, TimeEmbedding, log_buckets
from reclm.positions import PositionEmbedding

PADDING, ITEM, PROFILE, TIME = range(4)  # kinds of tokens
SESSION = 3600.0  # seconds without an action, after which a new session begins
HOURS, WEEKDAYS = 24, 7
TIME_TOKENS = NUM_BUCKETS + HOURS + WEEKDAYS
BLOCK = 4  # tokens an action may take: itself, and weekday, hour and gap of the next one


@dataclass(frozen=True)
class Vocabulary:
    """What the model must know of the data to have a place for each of them."""

    num_items: int
    num_users: int
    profile_sizes: tuple[int, ...] = ()  # codes of each field of a profile, with 0 for "unknown"
    num_actions: int = 0  # kinds of feedback; 0 where it is not known or not asked for
    features: dict[str, np.ndarray] = field(default_factory=dict)  # of items; see reclm/features.py
    cold_items: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # never trained
    num_contexts: int = 0  # what else is known when an item is shown; 0 where nothing is


def calendar(times: Tensor) -> tuple[Tensor, Tensor]:
    """Seconds since 1970 (...) -> weekday (...) from 0 = Monday, and hour (...), in UTC, int64."""
    return (times // 86400 + 3).long() % WEEKDAYS, (times // 3600).long() % HOURS


class Inputs(nn.Module):
    """Tokens of a row, and the sum of all that is known of each of them."""

    def __init__(self, cfg: ModelConfig, vocabulary: Vocabulary):
        super().__init__()
        self.cfg = cfg
        sizes = vocabulary.profile_sizes
        self.first_time = vocabulary.num_items + 1 + sum(sizes)
        first_profile = vocabulary.num_items + 1 + np.cumsum([0, *sizes])[:-1]  # of each field
        self.register_buffer("first_profile", torch.from_numpy(first_profile), persistent=False)
        self.has_time_tokens = cfg.time_tokens == "tokens"
        num_tokens = sum(sizes) + TIME_TOKENS * self.has_time_tokens
        self.token_embedding = nn.Embedding(num_tokens, cfg.dim) if num_tokens else None
        self.position_embedding = PositionEmbedding(cfg) if cfg.position_embedding else None
        self.time_embedding = TimeEmbedding(cfg) if cfg.time_tokens == "embedding" else None
        self.action_embedding = None
        if cfg.action_embedding:
            self.action_embedding = nn.Embedding(vocabulary.num_actions + 1, cfg.dim, padding_idx=0)
        self.context_embedding = None
        if vocabulary.num_contexts:
            self.context_embedding = nn.Embedding(vocabulary.num_contexts + 1, cfg.dim, padding_idx=0)

    @property
    def max_tokens(self) -> int:
        """The longest row, with room for a candidate behind it."""
        per_action = BLOCK if self.has_time_tokens else 1
        return len(self.first_profile) + per_action * (self.cfg.max_len + 1)

    def forward(self, row: dict[str, Tensor], item_table: Tensor) -> Tensor:
        """A row as `lay_out` makes it, and the item table (V, D) -> (B, S, D)"""
        table = item_table
        if self.token_embedding is not None:
            table = torch.cat([item_table, self.token_embedding.weight])
        x = F.embedding(row["token_ids"], table, padding_idx=PADDING)  # (B, S, D)
        if self.position_embedding is not None:
            x = x + self.position_embedding(row["before"])
        if self.time_embedding is not None:
            x = x + self.time_embedding(row)
        if self.action_embedding is not None:
            x = x + self.action_embedding(row["actions"])
        if self.context_embedding is not None:
            x = x + self.context_embedding(row["contexts"])
        return x

    def lay_out(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """A batch with T actions a sequence -> the same as S tokens, and `queries`:

        token_ids, kinds (B, S), how many actions came `before` each and, where the batch has them, actions,
        contexts, timestamps, next_timestamps, and the differences of times since_last and until_next (B, S);
        (B, T), the position whose output predicts what follows each action, None where that is its own."""
        ids = batch["item_ids"]  # (B, T)
        if self.token_embedding is None:
            row, queries = batch | {"token_ids": ids, "kinds": (ids != PADDING).long() * ITEM}, None
        else:
            row, queries = self.insert_tokens(batch)
        if self.position_embedding is not None:
            is_action = (row["kinds"] == ITEM).long()
            row["before"] = row["num_before"][:, None] + is_action.cumsum(1) - is_action
        if "timestamps" in row:
            times = row["timestamps"]
            row["since_last"] = times.diff(dim=1, prepend=times[:, :1])  # (B, S), 0 for the first token
            row["until_next"] = row["next_timestamps"] - times
        return row, queries

    def lay_out_candidates(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with C candidates a sequence -> a token for each, as the next action of the history that
        it sees, but with a feedback that is not known: the fields of `lay_out` (B, C), and the `position`
        of each in the row."""
        seen = batch["candidate_seen"]  # (B, C)
        row = {
            "token_ids": batch["candidate_ids"],
            "actions": torch.zeros_like(seen),
            "before": batch["num_before"][:, None] + seen,
            "position": len(self.first_profile) + seen,
        }
        if "candidate_times" in batch:
            last = batch["timestamps"].gather(1, (seen - 1).clamp(min=0))  # (B, C)
            row["timestamps"] = batch["candidate_times"]
            row["since_last"] = (batch["candidate_times"] - last) * (seen > 0)
        if "candidate_contexts" in batch:
            row["contexts"] = batch["candidate_contexts"]
        return row

    def insert_tokens(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """For `lay_out`: the row of a vocabulary with tokens that are no items."""
        ids = batch["item_ids"]  # (B, T)
        prefix, body = [], [ids[..., None]]  # each (B, n), and (B, T, n); 0 where there is no token
        if len(self.first_profile):
            prefix.append(batch["profiles"] + self.first_profile)
        if self.has_time_tokens:
            prefix.append(self.first_time + NUM_BUCKETS + self.calendar_tokens(batch["timestamps"][:, 0]))
            body.append(self.tokens_of_next(batch))
        prefix, body = torch.cat(prefix, dim=1), torch.cat(body, dim=2)
        width, step = prefix.shape[1], body.shape[2]
        slots = torch.cat([prefix, body.flatten(1)], dim=1)  # (B, P + T n)
        there = slots != PADDING
        positions = there.cumsum(1) - 1  # in the row, or of the last token before
        size = int(positions[:, -1].max()) + 1
        target = positions.masked_fill(~there, size)

        def close_up(values: Tensor) -> Tensor:
            """(B, P + T n) in slots -> (B, S) without the empty ones"""
            return values.new_zeros(len(values), size + 1).scatter(1, target, values)[:, :size]

        def by_action(name: str, in_prefix: Tensor, of_next: Tensor) -> Tensor:
            """A field (B, T) for all tokens: items have their own value"""
            values = of_next[..., None].repeat(1, 1, step)  # (B, T, n)
            values[..., 0] = batch[name]
            return close_up(torch.cat([in_prefix.expand(-1, width), values.flatten(1)], dim=1))

        kinds = torch.full_like(slots, TIME)
        kinds[:, : len(self.first_profile)] = PROFILE
        kinds[:, width::step] = ITEM
        row = batch | {"token_ids": close_up(slots), "kinds": close_up(kinds)}
        if "timestamps" in batch:  # a time token comes when the next action does
            first, after = batch["timestamps"][:, :1], batch["next_timestamps"]
            row["timestamps"] = by_action("timestamps", first, after)
            row["next_timestamps"] = by_action("next_timestamps", first, after)
        none = torch.zeros_like(ids)
        for name in ("actions", "contexts"):
            if name in batch:
                row[name] = by_action(name, none[:, :1], none)
        query = width + (step - 1 if self.cfg.request_time else 0)
        return row, positions[:, query::step]

    def calendar_tokens(self, times: Tensor) -> Tensor:
        """(...) seconds -> (..., 2): weekday and hour, from the first token of their range on"""
        weekday, hour = calendar(times)
        return torch.stack([HOURS + weekday, hour], dim=-1)

    def tokens_of_next(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, 3): weekday, hour and gap of the action after each; 0 where it is not to be known"""
        times, after = batch["timestamps"], batch["next_timestamps"]
        gaps = after - times  # (B, T)
        session = (gaps >= SESSION)[..., None]
        dates = (self.first_time + NUM_BUCKETS + self.calendar_tokens(after)) * session  # (B, T, 2)
        tokens = torch.cat([dates, (self.first_time + log_buckets(gaps).long())[..., None]], dim=2)
        last = batch["lengths"] - (0 if self.cfg.request_time else 1)
        known = torch.arange(times.shape[1], device=times.device) < last[:, None]  # (B, T)
        return tokens * known[..., None]


class ItemContent(nn.Module):
    """Content of items in the item table, gated by what their ids say (as LiGR gates its branches):

        row = id + sum over modalities of sigmoid(W id) * content

    so that an item without an id vector, which no one has chosen yet, is known by half its content. Vectors
    of words are averaged; frozen vectors (text, images) are projected. Both start at 0, without a say."""

    def __init__(self, cfg: ModelConfig, features: dict[str, np.ndarray]):
        super().__init__()
        self.id_dropout = cfg.id_dropout
        self.projections, self.gates = nn.ModuleList(), nn.ModuleList()
        for i, array in enumerate(features.values()):
            rows = torch.from_numpy(np.pad(array, ((1, 0), (0, 0))))  # (V, K or F): row 0 is padding
            self.register_buffer(f"rows_{i}", rows, persistent=False)
            if rows.is_floating_point():
                projection = nn.Linear(rows.shape[1], cfg.dim, bias=False)
            else:
                size = int(rows.max()) + 1
                projection = nn.EmbeddingBag(size, cfg.dim, mode="mean", padding_idx=PADDING)
            self.projections.append(projection)
            self.gates.append(nn.Linear(cfg.dim, cfg.dim, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of ids (V, D) -> the item table (V, D). In training a share of `id_dropout` of the items
        goes without an id (DropoutNet, NeurIPS 2017), so that content learns to stand alone."""
        if self.training and self.id_dropout:
            ids = ids * (torch.rand(len(ids), 1, device=ids.device) >= self.id_dropout)
        table = ids
        for i, (projection, gate) in enumerate(zip(self.projections, self.gates, strict=True)):
            content = projection(getattr(self, f"rows_{i}"))  # (V, D)
            table = table + torch.sigmoid(gate(ids)) * content
        return table
