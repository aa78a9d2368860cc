"""The recommender: item embedding -> causal blocks -> a user embedding per position -> MF layer.

Letters in the shape comments:
    B  batch (sequences)    T  sequence length            D   model width (`dim`)
    H  query heads          G  key-value heads            Dh  head width (D / H)
    F  feed-forward width   W  attention window           N   negatives
    V  item-table rows: items are 1..V-1, row 0 is padding
    M  positions of a batch that have a target (no padding)
    S  tokens of a row: the T actions and, where asked, profile and time tokens (reclm/inputs.py); else T
    C  candidates of a ranker (--task=ctr) for a sequence

Sequences are padded on the right. With causal attention no real position ever sees the padding, so
the fast causal kernel needs no padding mask, and padded positions are dropped before the loss.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import LossConfig, ModelConfig
from reclm.dropout import Dropout
from reclm.heads import ClickHead, click_loss
from reclm.hstu import HSTUBlock
from reclm.inputs import Inputs, ItemContent, Vocabulary
from reclm.losses import LOSSES
from reclm.next_time import TimeHead, log_time

Memory = tuple[Tensor, Tensor]  # keys and values of a row, each (B, G, S, Dh)
CANDIDATES_AT_ONCE = 128  # more are ranked in turns, over the same history


class Context(NamedTuple):
    """What every block may look at beside its input; the same for all layers but for `memory`."""

    rotary: Tensor  # rotations of the keys, complex (T, Dh/2)
    query_rotary: Tensor  # the same for the queries
    mask: Tensor | None  # bool (queries, T), True = may attend; None = plain causal
    last: Tensor | None = None  # (B,) the only position whose output is wanted; None = all of them
    times: Tensor | None = None  # (B, T) timestamps of the actions in seconds; None = not known
    query_times: Tensor | None = None  # (B, queries) when the outputs are asked for
    # When the tokens are candidates, each the next one after a part of a history and unseen by the others:
    memory: Memory | None = None  # of the history
    position: Tensor | None = None  # (B, C): how many of its tokens each candidate sees

    def wanted(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the positions whose output is wanted: (B, T, D), or (B, 1, D)."""
        return x if self.last is None else x[torch.arange(len(x), device=x.device), self.last][:, None]


def rotary_table(length: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """The rotations exp(i m theta_j) of RoPE (arXiv 2104.09864, eq. 15), complex, (length, head_dim / 2)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)  # (Dh/2,)
    angles = torch.outer(torch.arange(length).float(), frequencies)  # (T, Dh/2)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, heads, T, Dh) by its position's angle, so that dot products
    depend on distance: one complex product, a single pass over x where sines and cosines take four."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, Dh/2)
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.dim // cfg.n_heads
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * self.head_dim, cfg.dim, bias=False)
        self.groups = cfg.n_heads // cfg.kv_heads

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, D) -> (B, T, D); position t sees positions <= t, at most the last W of them."""
        q = self.wq(ctx.wanted(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, Dh)
        q = rotate(q, ctx.query_rotary)
        k, v = self.remember(x, ctx)
        if ctx.memory is not None:  # candidates see themselves behind it
            k, v = (
                torch.cat(pair, dim=2) for pair in zip(ctx.memory, (k, v), strict=True)
            )  # (B, G, S + C, Dh)
        if self.groups > 1:  # the CPU's fused kernel wants as many key as query heads
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, H, T, Dh)
        # No dropout on the attention weights: the fused kernels of the CPU do not have it, and LLaMA
        # has none. Dropout acts on the embedding and on both residual branches instead.
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=ctx.mask, is_causal=ctx.mask is None
        )  # (B, H, T, Dh)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def remember(self, x: Tensor, ctx: Context) -> Memory:
        """(B, T, D) -> keys and values"""
        k = self.wk(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, G, T, Dh)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, G, T, Dh)
        return rotate(k, ctx.rotary), v


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, F) inside


class Residual(nn.Module):
    """x + branch; gated (LiGR, arXiv 2502.03417): x + sigmoid(W x) * branch."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(cfg.dim, cfg.dim, bias=False) if cfg.gated_residuals else None
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """(B, T, D), (B, T, D) -> (B, T, D)"""
        if self.gate is not None:
            branch = torch.sigmoid(self.gate(x)) * branch
        return x + self.dropout(branch)


class TransformerBlock(nn.Module):
    """LLaMA2 block (arXiv 2307.09288): pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.attention_residual = Residual(cfg)
        self.ffn_residual = Residual(cfg)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = self.attention_residual(ctx.wanted(x), self.attention(self.attention_norm(x), ctx))
        return self.ffn_residual(x, self.feed_forward(self.ffn_norm(x)))

    def remember(self, x: Tensor, ctx: Context) -> Memory:
        """What candidates see of a history (B, T, D)."""
        return self.attention.remember(self.attention_norm(x), ctx)


BLOCKS = {"llama": TransformerBlock, "hstu": HSTUBlock}
# Weights that begin at 0.
SILENT = (
    "gate", "position_embedding", "time_embedding", "action_embedding", "projections", "time_head", "logit"
)  # fmt: skip


class SequenceRecommender(nn.Module):
    """Every use of a parameter happens inside `forward`, so DDP and its kin see all of them."""

    def __init__(self, cfg: ModelConfig, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__()
        self.cfg, self.loss = cfg, loss
        num_rows = vocabulary.num_items + 1  # V: items and padding
        self.item_embedding = nn.Embedding(num_rows, cfg.dim, padding_idx=0)
        self.layers = nn.ModuleList(BLOCKS[cfg.model_name](cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.dropout = Dropout(cfg.dropout)
        self.inputs = Inputs(cfg, vocabulary)
        if cfg.user_embedding == "explicit":
            self.user_embedding = nn.Embedding(vocabulary.num_users, cfg.dim)
        self.content = ItemContent(cfg, vocabulary.features) if vocabulary.features else None
        self.time_head = TimeHead(cfg) if cfg.time_head else None
        self.click_head = ClickHead(cfg) if cfg.task == "ctr" else None
        rotary = rotary_table(self.inputs.max_tokens, cfg.dim // cfg.n_heads)
        self.register_buffer("rotary", rotary, persistent=False)
        cold = torch.zeros(num_rows, dtype=torch.bool)  # (V,): no id vector and no candidates in the loss
        cold[torch.tensor(vocabulary.cold_items)] = True
        self.register_buffer("cold", cold, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The one place where weights are initialised.

        | weight                   | initial value                                                     |
        |--------------------------|-------------------------------------------------------------------|
        | item, user embedding     | normal, std 1 / sqrt(D): rows of unit length; padding row 0       |
        | wq wk wv w1 w3           | normal, std 1 / sqrt(fan in): keeps the scale of activations      |
        | wo w2 (into the residual)| the same / sqrt(2 n_layers): the sum of branches stays of order 1 |
        | RMSNorm gains            | 1                                                                 |
        | gates                    | 0: each half open                                                 |
        | position, time, action   | 0: without a say                                                  |
        | content of items         | 0: without a say                                                  |
        | profile and time tokens  | as items                                                          |
        | contexts of impressions  | as items                                                          |
        | items held out           | 0, and stay so                                                    |
        | next-time head           | weights 0: the same mixture for all; see reclm/next_time.py       |
        | click head               | last layer 0: each click as likely as not                         |
        """
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= (2 * self.cfg.n_layers) ** 0.5
            if any(part in name for part in SILENT):
                std = 0.0
            nn.init.normal_(weight, std=std)
        self.item_embedding.weight[0] = 0.0
        self.item_embedding.weight[self.cold] = 0.0

    def encode(
        self, batch: dict[str, Tensor], last_only: bool = False, table: Tensor | None = None
    ) -> Tensor:
        """item_ids (B, T) -> the user's embedding after each action, (B, T, D), in float32; with
        `last_only` after the last one, (B, 1, D): the top block then works for one query a sequence.
        `table`: the item table, where it has been computed already."""
        table = self.item_table() if table is None else table
        row, queries = self.inputs.lay_out(batch)
        x = self.embed(row, table)  # (B, S, D)
        contexts = [self.context(row)] * len(self.layers)
        if last_only:
            last = batch["lengths"] - 1  # (B,)
            if queries is not None:
                last = queries.gather(1, last[:, None])[:, 0]
            contexts[-1] = self.context(row, last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            for layer, ctx in zip(self.layers, contexts, strict=True):
                x = layer(x, ctx)
        hidden = self.norm(x.float())  # (B, S, D)
        if queries is not None and not last_only:
            hidden = hidden.gather(1, queries[..., None].expand(-1, -1, self.cfg.dim))  # (B, T, D)
        if self.cfg.user_embedding == "explicit":  # SASRec (arXiv 1808.09781), section III.E
            hidden = hidden + self.user_embedding(batch["user_ids"])[:, None]
        if self.cfg.scores == "cosine":
            return F.normalize(hidden, dim=-1) / self.cfg.temperature
        return hidden

    def embed(self, row: dict[str, Tensor], table: Tensor) -> Tensor:
        """(B, S, D): unit rows become channels of order 1, as the norms expect."""
        return self.dropout(self.inputs(row, table) * self.cfg.dim**0.5)

    def context(self, row: dict[str, Tensor], last: Tensor | None = None) -> Context:
        """What the blocks need for these rows, or for one position (B,) of each alone."""
        length = row["token_ids"].shape[1]
        window = self.cfg.window or length
        rotary = self.rotary[:length]
        times = row.get("timestamps")
        query_times = row.get("next_timestamps") if self.cfg.request_time else times
        if last is None and window >= length:
            return Context(rotary, rotary, None, None, times, query_times)
        keys = torch.arange(length, device=rotary.device)
        age = (keys if last is None else last)[:, None] - keys  # (queries, T): how many positions ago
        mask = (age >= 0) & (age < window)
        if last is None:
            return Context(rotary, rotary, mask, None, times, query_times)
        # One query a sequence: (B, 1, 1, Dh/2) and (B, 1, 1, T), the same for all heads.
        if times is not None:
            query_times = query_times.gather(1, last[:, None])
        return Context(rotary, rotary[last][:, None, None], mask[:, None, None], last, times, query_times)

    def item_table(self) -> Tensor:
        """(V, D): the MF layer's item factors, shared with the input embedding. In training compute it once
        a step: a part of the ids may be dropped at random."""
        table = self.item_embedding.weight
        if self.content is not None:
            table = self.content(table)
        return F.normalize(table, dim=-1) if self.cfg.scores == "cosine" else table

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """With "targets" in the batch: the SUM of the loss over its M targets, a scalar.
        Without: float32 scores (B, V) of all items after the last action of each sequence; of a ranker
        logits (B, C) of the candidates."""
        table = self.item_table()
        if self.cfg.task == "ctr":
            logits = self.rank(batch, table)  # (B, C)
            return click_loss(logits, batch["targets"]) if "targets" in batch else logits
        if "targets" not in batch:
            return self.encode(batch, True, table)[:, 0] @ table.T
        hidden = self.encode(batch, table=table)  # (B, T, D)
        valid = batch["targets"] != 0  # (B, T)
        hidden, targets = hidden[valid], batch["targets"][valid]  # (M, D), (M,)
        loss = LOSSES[self.loss.loss](
            hidden, table, targets, *self.negatives(batch, valid, targets), t=self.loss.gbce_t
        )
        if self.time_head is not None:
            gaps = batch["next_timestamps"][valid] - batch["timestamps"][valid]  # (M,)
            loss = loss + self.loss.time_weight * self.time_head(hidden, log_time(gaps)).sum()
        return loss

    def rank(self, batch: dict[str, Tensor], table: Tensor) -> Tensor:
        """candidate_ids (B, C) -> the logit of a positive action on each, (B, C), in float32, as if it were
        the only one: it sees the part of the history before it, and itself. The history is worked through
        once for all of them (M-FALCON, arXiv 2402.17152, section 3.4)."""
        row, _ = self.inputs.lay_out(batch)
        ctx, x = self.context(row), self.embed(row, table)  # (B, S, D)
        memories = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            for layer in self.layers[:-1]:
                memories.append(layer.remember(x, ctx))
                x = layer(x, ctx)
            memories.append(self.layers[-1].remember(x, ctx))
        candidates = self.inputs.lay_out_candidates(batch)
        size = batch["candidate_ids"].shape[1] if self.training else CANDIDATES_AT_ONCE
        parts = zip(*(value.split(size, dim=1) for value in candidates.values()), strict=True)
        logits = []
        for part in parts:
            part = dict(zip(candidates, part, strict=True))
            ctx, x = self.candidate_context(row, part), self.embed(part, table)  # (B, c, D)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
                for layer, memory in zip(self.layers, memories, strict=True):
                    x = layer(x, ctx._replace(memory=memory))
            hidden = self.norm(x.float())
            if self.cfg.user_embedding == "explicit":
                hidden = hidden + self.user_embedding(batch["user_ids"])[:, None]
            logits.append(self.click_head(hidden))
        return torch.cat(logits, dim=1)

    def candidate_context(self, row: dict[str, Tensor], candidates: dict[str, Tensor]) -> Context:
        position = candidates["position"][..., None]  # (B, C, 1)
        length, count = row["token_ids"].shape[1], position.shape[1]
        keys = torch.arange(length, device=position.device)
        window = self.cfg.window or length + 1
        seen = (keys < position) & (keys > position - window)  # (B, C, S)
        itself = torch.eye(count, dtype=torch.bool, device=position.device).expand(len(seen), -1, -1)
        mask = torch.cat([seen, itself], dim=2)[:, None]  # (B, 1, C, S + C)
        rotary = self.rotary[position[..., 0]][:, None]  # (B, 1, C, Dh/2)
        times, query_times = row.get("timestamps"), candidates.get("timestamps")
        return Context(rotary, rotary, mask, None, times, query_times, position=candidates["position"])

    def negatives(self, batch: dict, valid: Tensor, targets: Tensor) -> tuple:
        """(negatives, excluded), as the losses want them (reclm/losses.py)."""
        owner = valid.nonzero()[:, 0]  # (M,): the sequence of each position
        seen = None
        if "seen_items" in batch:
            seen = self.cold.repeat(len(valid), 1).scatter_(1, batch["seen_items"], True)  # (B, V)
        if self.loss.loss == "softmax":
            return None, None if seen is None else (seen, owner)
        negatives = batch["negatives"]
        if negatives.dim() > 1:  # drawn for each position, free of its target by construction
            return negatives[valid], None
        excluded = negatives == targets[:, None]  # (M, N)
        if seen is not None:
            excluded |= seen[:, negatives][owner]
        return negatives, excluded
