"""The recommender: item embedding -> causal blocks -> one user embedding per position -> MF layer.

Letters in the shape comments:
    B  batch (sequences)    T  sequence length            D   model width (`dim`)
    H  query heads          G  key-value heads            Dh  head width (D / H)
    F  feed-forward width   W  attention window           N   negatives
    V  item-table rows: items are 1..V-1, row 0 is padding
    M  positions of a batch that have a target (no padding)
    S  tokens of a row: T actions and optional profile and time tokens (reclm/nn/inputs.py)
    n  tokens of one pass through the blocks    Q  those that are queries    K  keys they may attend to
    C  candidates per sequence (--task=ctr)

Sequences are padded on the right, so under causal attention no real position sees padding: the fast causal
kernel needs no padding mask. The outputs at padded positions are dropped before the loss.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary
from reclm.draws import Draws
from reclm.errors import choose
from reclm.nn.context import Context, KVCache, rotate, rotations
from reclm.nn.heads import TIME_WEIGHT, CTRHead, TimeHead, ctr_loss, time_errors, time_loss
from reclm.nn.hstu import HSTUBlock
from reclm.nn.inputs import Inputs, ItemContent
from reclm.nn.layers import (
    NORM_EPS,
    Dropout,
    ItemEmbedding,
    ResidualLinear,
    Table,
    ZeroEmbedding,
    ZeroEmbeddingBag,
    ZeroLinear,
)
from reclm.nn.losses import LOSSES, NEEDS_NO_NEGATIVES, Excluded, exclude_negatives, score_items
from reclm.nn.pq import PQEmbedding

CANDIDATES_AT_ONCE = 128  # in evaluation, more are scored in chunks that share one encoded history


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.kv_heads * self.head_dim, bias=False)
        self.wo = ResidualLinear(cfg.n_heads * self.head_dim, cfg.dim, bias=False)
        self.groups = cfg.n_heads // cfg.kv_heads

    def forward(self, x: Tensor, ctx: Context, cache: KVCache | None = None) -> Tensor:
        """(B, n, D) -> (B, Q, D)"""
        q = self.heads(self.wq(ctx.queries(x)))  # (B, H, Q, Dh)
        # RoPE: with q and k rotated by angles proportional to their positions, q.k depends on the distance
        # only. There is no position table to train, and values are not rotated.
        q = rotate(q, ctx.query_rotary)
        k, v = self.keys_values(x, ctx)  # (B, G, n, Dh)
        if ctx.candidates:
            out = self.attend_to_history(q, k, v, cache, ctx)
        else:
            k, v = (k, v) if cache is None else cache.add(k, v, ctx.slots)
            out = self.attend(q, k, v, ctx.mask)  # (B, H, Q, Dh)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, Q, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, H, Q, Dh), k and v (B, G, K, Dh), mask (1 or B, 1, Q, K) or None for all earlier tokens ->
        (B, H, Q, Dh)"""
        # No dropout on the attention weights: LLaMA has none, and the CPU's fused kernels do not support it.
        # Dropout acts on the embedding and on both residual branches instead.
        if mask is None or self.groups == 1:
            k, v = self.repeat(k), self.repeat(v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        # The queries of the heads that share keys become queries of one head: no key is repeated.
        q = q.unflatten(1, (-1, self.groups)).flatten(2, 3)  # (B, G, H / G * Q, Dh)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, self.groups, 1))
        return out.unflatten(2, (self.groups, -1)).flatten(1, 2)

    def attend_to_history(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, ctx: Context) -> Tensor:
        """Queries q (B, H, C, Dh) of C candidates, their own k and v (B, G, C, Dh), and the cached history ->
        (B, H, C, Dh). Each candidate attends to its history and to itself. The fused kernel would need C
        keys more per candidate, of which a mask keeps one."""
        q = q * self.head_dim**-0.5
        scores = q @ self.repeat(cache.keys).transpose(-1, -2)  # (B, H, C, K)
        scores = scores.masked_fill_(~ctx.mask, -torch.inf)
        own = (q * self.repeat(k)).sum(-1, keepdim=True)  # (B, H, C, 1)
        weights = torch.cat([scores, own], dim=-1).softmax(-1)
        return weights[..., :-1] @ self.repeat(cache.values) + weights[..., -1:] * self.repeat(v)

    def repeat(self, x: Tensor) -> Tensor:
        """(B, G, n, Dh) -> (B, H, n, Dh): the CPU's fused kernel needs as many key heads as query heads."""
        return x if self.groups == 1 else x.repeat_interleave(self.groups, dim=1)

    def keys_values(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """(B, n, D) -> rotated keys and values, (B, G, n, Dh) each"""
        return rotate(self.heads(self.wk(x)), ctx.rotary), self.heads(self.wv(x))

    def heads(self, x: Tensor) -> Tensor:
        """(B, n, heads * Dh) -> (B, heads, n, Dh)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6): w2(SiLU(w1 x) * w3 x)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.w2 = ResidualLinear(cfg.ffn_dim, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, F) inside


class Residual(nn.Module):
    """x + branch, or with --gated_residuals (LiGR, arXiv 2502.03417) x + sigmoid(W x) * branch."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = ZeroLinear(cfg.dim, cfg.dim, bias=False) if cfg.gated_residuals else None
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x: Tensor, branch: Tensor, draws: Draws | None) -> Tensor:
        """(B, T, D), (B, T, D) -> (B, T, D)"""
        if self.gate is not None:
            branch = torch.sigmoid(self.gate(x)) * branch
        return x + self.dropout(branch, draws)


class TransformerBlock(nn.Module):
    """LLaMA2 block (arXiv 2307.09288): pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        # RMSNorm only rescales (arXiv 1910.07467): it subtracts no mean, and so needs no bias to restore one.
        self.attention_norm = nn.RMSNorm(cfg.dim, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(cfg.dim, eps=NORM_EPS)
        self.attention_residual = Residual(cfg)
        self.ffn_residual = Residual(cfg)

    def forward(self, x: Tensor, ctx: Context, cache: KVCache | None = None) -> Tensor:
        """(B, n, D) -> (B, Q, D)"""
        branch = self.attention(self.attention_norm(x), ctx, cache)
        x = self.attention_residual(ctx.queries(x), branch, ctx.draws)
        return self.ffn_residual(x, self.feed_forward(self.ffn_norm(x)), ctx.draws)

    def read(self, x: Tensor, ctx: Context, cache: KVCache) -> None:
        """Put the keys and values of tokens (B, n, D) into an empty cache; compute no output."""
        cache.add(*self.attention.keys_values(self.attention_norm(x), ctx))


BLOCKS = {"llama": TransformerBlock, "hstu": HSTUBlock}


class SequenceRecommender(nn.Module):
    """Training (main.py) and evaluate.py call `forward` only, so wrappers such as DDP and FSDP see every use
    of a parameter; reclm/nn/incremental.py calls other methods, for inference without wrappers. Raises
    UserError for an unknown --task, --model_name or --loss."""

    def __init__(
        self,
        cfg: ModelConfig,
        loss: LossConfig,
        vocabulary: Vocabulary,
        items: Callable[..., ItemEmbedding] = ItemEmbedding,
    ):
        """`items(num_rows, dim, padding_idx=0)` makes a table with a vector per item."""
        super().__init__()
        self.cfg, self.loss = cfg, loss
        self.run_task, head = choose("task", cfg.task, FORWARD)
        self.compute_loss = choose("loss", loss.loss, LOSSES)
        block = choose("model_name", cfg.model_name, BLOCKS)
        num_rows = vocabulary.num_items + 1  # V: items and padding
        if cfg.item_table == "pq":
            self.item_embedding = PQEmbedding(num_rows, cfg)
        else:
            self.item_embedding = items(num_rows, cfg.dim, padding_idx=0)
        self.layers = nn.ModuleList(block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=NORM_EPS)
        self.dropout = Dropout(cfg.dropout)
        self.inputs = Inputs(cfg, vocabulary)
        if cfg.user_embedding == "explicit":
            self.user_embedding = nn.Embedding(vocabulary.num_users, cfg.dim)
        self.content = ItemContent(cfg, vocabulary.features) if vocabulary.features else None
        self.time_head = TimeHead(cfg) if cfg.time_head else None
        self.head = head(cfg) if head else None
        rotary = rotations(torch.arange(self.inputs.max_tokens).float(), cfg.head_dim)
        self.register_buffer("rotary", rotary, persistent=False)
        cold_items = torch.tensor(vocabulary.cold_items)  # never trained: id vector 0, never a negative
        self.register_buffer("cold_items", cold_items, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the initial value of every matrix, by the type of its module (reclm/nn/layers.py):

        | module             | where                                | initial value                          |
        |--------------------|--------------------------------------|----------------------------------------|
        | Embedding(Bag)     | items, users, tokens, time-head gaps | normal, std 1 / sqrt(width): unit rows |
        | Linear             | wq wk wv wu w1 w3, layers of heads   | normal, std 1 / sqrt(fan in)           |
        | PQEmbedding        | items, --item_table=pq               | normal, std 1 / sqrt(D): unit rows     |
        | ResidualLinear     | wo w2                                | the same / sqrt(2 n_layers)            |
        | ZeroLinear         | gates, content, outputs of heads     | 0, so that a gate starts at 1/2        |
        | ZeroEmbedding(Bag) | position, time, feedback, words      | 0: no effect before training           |

        Vectors keep the values that their modules gave them: norm gains 1, the relative bias of HSTU 0, the
        biases of heads torch's default. Item rows of padding and cold items are 0 and stay 0 in training."""
        for module in self.modules():
            for weight in module.parameters(recurse=False):
                if weight.dim() < 2:
                    continue
                std = weight.shape[1] ** -0.5
                if isinstance(module, ResidualLinear):  # the sum over 2 n_layers branches stays of order 1
                    std /= (2 * self.cfg.n_layers) ** 0.5
                if isinstance(module, PQEmbedding):  # a row of the table is m of its rows
                    std = self.cfg.dim**-0.5
                if isinstance(module, (ZeroLinear, ZeroEmbedding, ZeroEmbeddingBag)):
                    std = 0.0
                fill = getattr(module, "normal_", partial(nn.init.normal_, weight))
                fill(std=std)
        if not isinstance(self.item_embedding, PQEmbedding):
            self.item_embedding.weight[0] = 0.0
            self.item_embedding.weight[self.item_embedding.local(self.cold_items)] = 0.0

    def item_table(self) -> Table:
        """(V, D): the item factors of the MF layer, tied to the input embedding. In training, call it once
        per forward pass: with --id_dropout each call drops other ids."""
        table = self.item_embedding.table()
        return table if self.content is None else self.content(table)

    def forward(self, batch: dict[str, Tensor], output: str = "") -> Tensor | dict[str, Tensor]:
        """A batch of data.py with "targets" or "labels" -> the SUM of the loss over them in nats, a scalar.

        Without them: float32 scores (B, V) of all items after the last action of each sequence
        (task=matching), or logits (B, C) of the candidates (task=ctr). With `output="time_errors"`:
        {name: (B,)} of reclm.nn.heads.time_errors."""
        if output == "time_errors":
            hidden = self.encode(batch, last_only=True)[:, 0]
            return time_errors(self.time_head, hidden, batch)
        return self.run_task(self, batch, self.item_table())

    def encode(self, batch: dict[str, Tensor], last_only: bool = False, table: Table | None = None) -> Tensor:
        """item_ids (B, T) -> float32 user embeddings after each action, (B, T, D), or with `last_only` after
        the last one, (B, 1, D). `table` is the item table, if already computed."""
        table = self.item_table() if table is None else table
        row, queries = self.inputs.lay_out(batch)
        last = None
        if last_only:  # lower blocks still need all tokens as keys; the top block gets one query per sequence
            last = batch["lengths"] - 1  # (B,)
            if queries is not None:
                last = queries.gather(1, last[:, None])[:, 0]
        draws = Draws.of(batch) if self.training else None
        hidden = self.through_blocks(self.embed(row, table, draws), self.context(row, draws), last=last)
        if queries is not None and not last_only:
            hidden = hidden.gather(1, queries[..., None].expand(-1, -1, self.cfg.dim))  # (B, T, D)
        return self.add_user(hidden, batch)

    def embed(self, row: dict[str, Tensor], table: Table, draws: Draws | None = None) -> Tensor:
        """A row of token_ids (B, S) -> the input of the first block, (B, S, D)."""
        # Item rows have length 1, so scores start at order 1; times sqrt(D), so do the blocks' inputs.
        return self.dropout(self.inputs(row, table) * self.cfg.dim**0.5, draws)

    def context(self, row: dict[str, Tensor], draws: Draws | None = None) -> Context:
        """The Context of whole rows: each of S tokens is a query and a key."""
        length = row["token_ids"].shape[1]
        positions = torch.arange(length, device=self.rotary.device)[None]  # (1, S)
        times = row.get("timestamps")
        query_times = row.get("next_timestamps") if self.cfg.request_time else times
        window = self.cfg.window
        if not torch.compiler.is_exporting() and window >= length:
            window = 0  # it hides nothing, and plain causal attention has a faster kernel
        rotary = self.rotary[:length]
        return Context(positions, positions, rotary, window, times, query_times, draws=draws)

    def through_blocks(
        self,
        x: Tensor,
        ctx: Context,
        caches: list[KVCache] | None = None,
        last: Tensor | None = None,
        output: bool = True,
    ) -> Tensor | None:
        """(B, n, D) -> float32 (B, n, D), or (B, 1, D) for the tokens `last` (B,) alone. Keys and values go
        into `caches`, one per layer, if given. Without `output`, fill the caches and return None."""
        caches = caches or [None] * len(self.layers)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
                x = layer(x, ctx, cache)
            if not output:
                return self.layers[-1].read(x, ctx, caches[-1])
            x = self.layers[-1](x, ctx if last is None else ctx.only(last), caches[-1])
        # Scores are float32 even with --dtype=bfloat16, whose 8 bits of precision would tie many items.
        return self.norm(x.float())

    def add_user(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(B, n, D) -> (B, n, D), with --user_embedding=explicit plus one trained vector per user (SASRec,
        arXiv 1808.09781, section III.E)."""
        if self.cfg.user_embedding == "explicit":
            hidden = hidden + self.user_embedding(batch["user_ids"])[:, None]
        return hidden

    def score_candidates(self, batch: dict[str, Tensor], table: Table) -> Tensor:
        """candidate_ids (B, C) -> float32 logits (B, C) of a positive action on each. A candidate attends to
        its history and itself, not to other candidates, so its logit is that of ranking it alone. The history
        is encoded once for all of them (M-FALCON, arXiv 2402.17152, section 3.4)."""
        row, _ = self.inputs.lay_out(batch)
        draws = Draws.of(batch) if self.training else None
        history, caches = self.context(row, draws), [KVCache() for _ in self.layers]
        self.through_blocks(self.embed(row, table, draws), history, caches, output=False)
        candidates = self.inputs.lay_out_candidates(batch)
        size = batch["candidate_ids"].shape[1] if self.training else CANDIDATES_AT_ONCE
        parts = zip(*(value.split(size, dim=1) for value in candidates.values()), strict=True)
        logits = []
        for part in parts:
            part = dict(zip(candidates, part, strict=True))
            ctx = Context(
                part["positions"],
                history.key_positions,
                self.rotary[part["positions"]][:, None],  # (B, 1, C, Dh/2, 2)
                self.cfg.window,
                history.times,
                part.get("timestamps"),
                candidates=True,
                draws=draws,
            )
            hidden = self.through_blocks(self.embed(part, table, draws), ctx, caches)  # (B, c, D)
            logits.append(self.head(self.add_user(hidden, batch)))
        return torch.cat(logits, dim=1)

    def negatives(self, batch: dict, valid: Tensor, targets: Tensor) -> tuple:
        """(negatives, excluded) of the M positions `valid` (B, T), as reclm/nn/losses.py defines them."""
        excluded = None
        if "seen_items" in batch:
            owner = valid.nonzero()[:, 0]  # (M,): the sequence of each position
            excluded = Excluded(batch["seen_items"], owner, self.cold_items)
        if self.loss.loss in NEEDS_NO_NEGATIVES:
            return None, excluded
        negatives = batch["negatives"]
        if negatives.dim() > 1:  # (B, T, N), drawn per position and never its target
            return negatives[valid], None
        return negatives, exclude_negatives(negatives, targets, excluded)


def match(model: SequenceRecommender, batch: dict[str, Tensor], table: Table) -> Tensor:
    """task=matching, next-item prediction: the loss or scores of SequenceRecommender.forward."""
    # The MF layer: as in matrix factorisation, a score is the dot product of a user and an item vector. But
    # the user vector is not looked up in a table: the blocks compute it from the history.
    if "targets" not in batch:
        return score_items(model.encode(batch, True, table)[:, 0], table)  # (B, V)
    hidden = model.encode(batch, table=table)  # (B, T, D)
    valid = batch["targets"] != 0  # (B, T)
    hidden, targets = hidden[valid], batch["targets"][valid]  # (M, D), (M,)
    loss = model.compute_loss(hidden, table, targets, *model.negatives(batch, valid, targets))
    if model.time_head is not None:
        loss = loss + TIME_WEIGHT * time_loss(model.time_head, hidden, batch, valid)
    return loss


def estimate_ctr(model: SequenceRecommender, batch: dict[str, Tensor], table: Tensor) -> Tensor:
    """task=ctr, the probability of a positive action: the loss or logits of SequenceRecommender.forward."""
    logits = model.score_candidates(batch, table)  # (B, C)
    return ctr_loss(logits, batch["labels"]) if "labels" in batch else logits


# Per task: (model, batch, item table) -> loss or scores, and the class of its head, if it needs one.
FORWARD = {"matching": (match, None), "ctr": (estimate_ctr, CTRHead)}
