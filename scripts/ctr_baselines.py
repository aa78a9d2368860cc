"""Train and evaluate a CTR baseline: logistic regression, or DIN (arXiv 1706.06978).

    torchrun --standalone --nproc_per_node=2 scripts/ctr_baselines.py --baseline=din --dataset=ml-1m
    torchrun --standalone --nproc_per_node=2 scripts/ctr_baselines.py --baseline=lr --dataset=ml-1m --lr=0.03

lr    logistic regression: the sum of one weight per user, item, profile field, content word and context
din   the sum of the user's actions, weighted by an attention on the candidate; an MLP scores the user, the
      candidate and that sum

--task=ctr is implied, and the flags of main.py for data and training apply: rows, batches, optimizer, epochs,
the choice of the epoch on validation and the metrics are those of main.py. The baselines have no blocks and
use the order of actions, not their times: settings of blocks and times are ignored in a --config file, so the
config of another model can be used, and refused as flags. --window=W limits DIN to the last W actions, which
is cheaper. lr needs a higher --lr than the default: its weights start at 0, and that of a user is updated in
about one step per epoch.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the spine

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import main as program
from reclm.config import Config, LossConfig, ModelConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.draws import Draws
from reclm.errors import UserError, choose
from reclm.flags import parse_args
from reclm.nn.heads import ctr_loss
from reclm.nn.inputs import PADDING
from reclm.nn.layers import Dropout
from reclm.run import dist, folder
from reclm.run.output import ScriptParser

OF_BLOCKS = set(
    "model_name n_layers n_heads n_kv_heads hidden_dim gated_residuals position_embedding time_tokens "
    "user_embedding id_dropout dtype compile".split()
)
NOT_HERE = {"eval_only", "ckpt_name", "resume", "init_from"}  # flags that only main.py supports
ATTENTION_WIDTH, WIDTHS = 36, (200, 80)  # of DIN's hidden layers, its figure 2
PAIRS = 2**17  # (candidate, action) pairs per chunk: 18 MiB of the attention's hidden layer


class Baseline(nn.Module):
    """Embeddings (D) of users, profiles, items, contexts and item content, all zero-initialised."""

    def __init__(self, cfg: ModelConfig, loss: LossConfig, vocabulary: Vocabulary, width: int):
        super().__init__()
        self.cfg = cfg
        self.item_embedding = nn.Embedding(vocabulary.num_items + 1, width, PADDING)
        self.user_embedding = nn.Embedding(vocabulary.num_users, width)
        self.profile_embeddings = nn.ModuleList(
            nn.Embedding(size, width, PADDING) for size in vocabulary.profile_sizes
        )
        self.context_embedding = None
        if "contexts" in vocabulary.code_sizes:
            self.context_embedding = nn.Embedding(vocabulary.code_sizes["contexts"] + 1, width, PADDING)
        self.content_embeddings = nn.ModuleList()
        for i, array in enumerate(vocabulary.features.values()):
            rows = torch.from_numpy(np.pad(array, ((1, 0), (0, 0))))  # (V, K or F): row 0 is padding
            self.register_buffer(f"rows_{i}", rows, persistent=False)
            if rows.is_floating_point():
                projection = nn.Linear(rows.shape[1], width, bias=False)
            else:
                projection = nn.EmbeddingBag(int(rows.max()) + 1, width, mode="sum", padding_idx=PADDING)
            self.content_embeddings.append(projection)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def item_table(self) -> Tensor:
        """(V, D): embeddings of ids plus their content"""
        table = self.item_embedding.weight
        for i, projection in enumerate(self.content_embeddings):
            table = table + projection(getattr(self, f"rows_{i}"))
        return table

    def shown(self, table: Tensor, ids: Tensor, contexts: Tensor | None) -> Tensor:
        """ids (...), contexts (...) -> (..., D), the sum of both embeddings"""
        x = F.embedding(ids, table, padding_idx=PADDING)
        return x if self.context_embedding is None else x + self.context_embedding(contexts)

    def users(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, D): embeddings of users plus their profiles"""
        x = self.user_embedding(batch["user_ids"])
        for i, embedding in enumerate(self.profile_embeddings):
            x = x + embedding(batch["profiles"][:, i])
        return x

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """As SequenceRecommender: logits (B, C), or with "labels" in the batch the SUM of their losses."""
        logits = self.logits(batch)
        return ctr_loss(logits, batch["labels"]) if "labels" in batch else logits


class LogisticRegression(Baseline):
    """Logistic regression: embeddings of width 1, and a bias."""

    def __init__(self, cfg: ModelConfig, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__(cfg, loss, vocabulary, 1)
        self.bias = nn.Parameter(torch.zeros(()))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, C)"""
        candidates = self.shown(self.item_table(), batch["candidate_ids"], batch.get("candidate_contexts"))
        return (candidates + self.users(batch)[:, None])[..., 0] + self.bias


class DIN(Baseline):
    """Deep Interest Network (arXiv 1706.06978), with SiLU instead of PReLU and Dice, dropout and
    --embedding_decay instead of its adaptive regularisation, and the features of an item or user summed
    instead of concatenated."""

    def __init__(self, cfg: ModelConfig, loss: LossConfig, vocabulary: Vocabulary):
        super().__init__(cfg, loss, vocabulary, cfg.dim)
        for embedding in (self.item_embedding, self.user_embedding):
            nn.init.normal_(embedding.weight, std=cfg.dim**-0.5)
        with torch.no_grad():
            self.item_embedding.weight[PADDING] = 0.0
        self.action_embedding = None
        if "actions" in vocabulary.code_sizes:
            self.action_embedding = nn.Embedding(vocabulary.code_sizes["actions"] + 1, cfg.dim, PADDING)
            nn.init.zeros_(self.action_embedding.weight)
        self.attention_hidden = nn.Linear(3 * cfg.dim, ATTENTION_WIDTH)
        self.attention_weight = nn.Linear(ATTENTION_WIDTH, 1)
        sizes = (4 * cfg.dim, *WIDTHS)
        hidden = [(nn.Linear(*pair), nn.SiLU()) for pair in zip(sizes, WIDTHS, strict=False)]
        self.mlp = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(WIDTHS[-1], 1))
        self.dropout = Dropout(cfg.dropout)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, C)"""
        table, scale = self.item_table(), self.cfg.dim**0.5  # brings channels to order 1
        candidates = scale * self.shown(table, batch["candidate_ids"], batch.get("candidate_contexts"))
        actions = self.shown(table, batch["item_ids"], batch.get("contexts"))  # (B, T, D)
        if self.action_embedding is not None:
            actions = actions + self.action_embedding(batch["actions"])
        users = (scale * self.users(batch))[:, None].expand_as(candidates)
        interest = self.interest(candidates, scale * actions, batch)  # (B, C, D)
        draws = Draws.of(batch) if self.training else None
        x = self.dropout(torch.cat([candidates, interest, candidates * interest, users], dim=2), draws)
        return self.mlp(x)[..., 0]

    def interest(self, candidates: Tensor, actions: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Candidates (B, C, D), actions (B, T, D) -> (B, C, D), the pooled actions per candidate, in chunks
        of candidates. A chunk skips actions that it does not use, and is recomputed in the backward pass."""
        size = max(1, PAIRS // actions.shape[:2].numel())
        pool = self.pool
        if torch.is_grad_enabled():
            pool = partial(checkpoint, pool, use_reentrant=False, preserve_rng_state=False)
        window, parts = self.cfg.window or actions.shape[1], []
        seen = batch["history_lengths"]  # (B, C)
        for part in torch.arange(candidates.shape[1], device=seen.device).split(size):
            last = seen[:, part]
            there = last[batch["candidate_ids"][:, part] != PADDING]
            first = max(0, int(there.min()) - window) if len(there) else 0
            keys = torch.arange(first, int(last.max()), device=seen.device)  # (t,)
            age = last[..., None] - keys  # (B, c, t): 1 for the last action before the candidate
            mask = (age > 0) & (age <= window)
            parts.append(pool(candidates[:, part], actions[:, keys], mask))
        return torch.cat(parts, dim=1)

    def pool(self, candidates: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """Eq. 3: (B, c, D), (B, t, D), bool (B, c, t) -> (B, c, D), the sum of the actions, each weighted by
        the activation unit on [action, candidate, their product]. Weights do not sum to 1.

        Given the candidate, the unit's first layer is linear in the action: one matrix product for all."""
        of_action, of_candidate, of_product = self.attention_hidden.weight.split(self.cfg.dim, dim=1)
        matrix = of_action + candidates[:, :, None] * of_product  # (B, c, A, D)
        offset = F.linear(candidates, of_candidate, self.attention_hidden.bias)  # (B, c, A)
        hidden = torch.baddbmm(offset.flatten(1)[:, None], actions, matrix.flatten(1, 2).transpose(1, 2))
        hidden = F.silu(hidden.unflatten(2, (-1, ATTENTION_WIDTH)))  # (B, t, c, A)
        weights = self.attention_weight(hidden)[..., 0].transpose(1, 2) * mask  # (B, c, t)
        return weights @ actions


BASELINES = {"lr": LogisticRegression, "din": DIN}


def read_args() -> tuple[str, Config]:
    """(name of the baseline, settings). Raises UserError for an unknown baseline or a flag without effect."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--baseline", help="lr (logistic regression) or din (Deep Interest Network)")
    parser.add_argument("--config", action="append", default=[], help="YAML file, as for main.py; repeatable")
    args, flags = parser.parse_known_args()
    choose("baseline", args.baseline, BASELINES)
    ours, files = parse_args(flags), parse_args([f"--config={path}" for path in args.config])
    if useless := ours.keys() & (OF_BLOCKS | NOT_HERE):
        raise UserError(f"--{min(useless)} has no effect on --baseline={args.baseline}: leave it out")
    files = {name: value for name, value in files.items() if name not in OF_BLOCKS | NOT_HERE}
    return args.baseline, build_config(files | ours | {"task": "ctr"})


def main() -> None:
    with dist.distributed():
        name, cfg = read_args()
        dataset = program.open_dataset(cfg)
        torch.manual_seed(cfg.train.seed)
        cfg.model.model_name = name  # for result.json and the name of the folder
        model = BASELINES[name](cfg.model, cfg.loss, dataset.vocabulary)
        run = program.Run(cfg, dataset, model.to(dist.pick_device(cfg.run.device)))
        with folder.claimed(cfg, dataset.name, None) as out_dir:
            run.open(out_dir)
            program.fit(run)


if __name__ == "__main__":
    main()
