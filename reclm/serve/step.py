"""A trained model as one graph of plain tensors, for other runtimes (ONNX): tokens in, user embeddings out.

The same graph reads a whole history, after an empty past, and goes on from the keys and values of earlier
tokens. B rows of n tokens, padded on the right, after P earlier ones; B > 1 only with P = 0:

    token_ids (B, n)        as reclm/nn/inputs.py lays them out          last (B,)   index of the last token
    past (L, 2, B, G, P, Dh) keys and values of earlier tokens, per layer
    timestamps, query_times (B, n), past_times (B, P)   seconds since 1970, where hstu blocks read them
    since_last, until_next (B, n)   seconds, for --time_tokens=embedding and --request_time
    before (B, n)   number of earlier actions, for --position_embedding      actions, contexts (B, n)   codes

    -> hidden (B, D), scores (B, V), present (L, 2, B, G, P + n, Dh), item_table (V, D)"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model import SequenceRecommender
from reclm.errors import UserError
from reclm.nn.context import Context, KVCache, rotations
from reclm.nn.incremental import forgets
from reclm.nn.pq import PQEmbedding

OUTPUTS = ("hidden", "scores", "present", "item_table")
OPSET = 23  # the first with Attention and RMSNormalization


class Past(KVCache):
    """The keys and values of one layer, to which those of new tokens are appended."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def add(self, keys: Tensor, values: Tensor, slots: None = None) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class Step(nn.Module):
    """The graph: see above. `most_actions` is how many a row may ever hold, past included."""

    def __init__(self, model: SequenceRecommender, most_actions: int):
        super().__init__()
        self.model = model
        most_tokens = len(model.inputs.first_profile) + most_actions
        rotary = rotations(torch.arange(most_tokens).float(), model.cfg.head_dim)
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(self, row: dict[str, Tensor]) -> tuple[Tensor, ...]:
        model, past = self.model, row["past"]
        earlier = past.shape[4]
        positions = torch.arange(earlier + row["token_ids"].shape[1])[None]  # (1, P + n)
        times = row.get("timestamps")
        if times is not None:
            times = torch.cat([row["past_times"], times], dim=1)
        rotary, window = self.rotary[earlier : positions.shape[1]], model.cfg.window
        ctx = Context(positions[:, earlier:], positions, rotary, window, times, row.get("query_times"))
        layers = past.flatten(0, 1).unbind(0)
        top = replace(ctx.only(row["last"]), positions=row["last"][:, None] + earlier)  # of the last block
        caches = [Past(*pair) for pair in zip(layers[::2], layers[1::2], strict=True)]
        table = model.item_table()
        if isinstance(table, PQEmbedding):  # codes are what the file holds; a runtime may do as it likes
            table = table.dense()
        x = model.embed(row, table)
        for layer, cache in zip(model.layers, caches, strict=True):
            x = layer(x, top if layer is model.layers[-1] else ctx, cache)
        hidden = model.norm(x)[:, 0]
        present = torch.stack([part for cache in caches for part in (cache.keys, cache.values)])
        return hidden, hidden @ table.T, present.unflatten(0, (-1, 2)), table


def most_actions(model: SequenceRecommender) -> int:
    """How many actions a row of a session may hold before it is read again: max_len, or twice as many where
    that changes nothing."""
    return model.cfg.max_len * (2 if forgets(model.cfg) else 1)


def check_exportable(model: SequenceRecommender) -> None:
    """Raises UserError, saying why, for a model whose rows `Step` cannot read."""
    for name, value in (("task", "ctr"), ("user_embedding", "explicit"), ("time_tokens", "tokens")):
        if getattr(model.cfg, name) == value:
            raise UserError(f"a model of --{name}={value} cannot be exported: recommend with its checkpoint")


def example(model: SequenceRecommender, reads_times: bool) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """Per input of the graph: a tensor, and the names of its axes that may have any size"""
    cfg, (b, n, p) = model.cfg, (2, 4, 3)
    rows, earlier = {0: "batch", 1: "tokens"}, {0: "batch", 1: "past"}
    numbers, seconds = torch.ones(b, n, dtype=torch.int64), torch.ones(b, n, dtype=torch.float64)
    heads = cfg.n_heads if cfg.model_name == "hstu" else cfg.kv_heads
    past = torch.zeros(cfg.n_layers, 2, b, heads, p, cfg.head_dim)
    given = {
        "token_ids": (numbers, rows),
        "last": (numbers[:, 0], {0: "batch"}),
        "past": (past, {2: "batch", 4: "past"}),
    }
    if cfg.model_name == "hstu" and reads_times:
        given |= {name: (seconds, rows) for name in ("timestamps", "query_times")}
        given["past_times"] = (seconds[:, :p], earlier)
    if cfg.time_tokens == "embedding":
        given |= {name: (seconds, rows) for name in ("since_last", *["until_next"] * cfg.request_time)}
    if cfg.position_embedding:
        given["before"] = (numbers, rows)
    given |= {name: (numbers, rows) for name in model.inputs.code_embeddings}
    # torch.export takes inputs that are one tensor for one input.
    return {name: (tensor.clone(), axes) for name, (tensor, axes) in given.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings: those of the exporter are about its own code."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def write_graph(model: SequenceRecommender, reads_times: bool, metadata: dict[str, str], path: Path) -> None:
    """Write model.onnx, checked, with `metadata` in it."""
    import onnx

    given = example(model, reads_times)
    with quiet():
        program = torch.onnx.export(
            Step(model, most_actions(model)).eval(),
            kwargs={"row": {name: tensor for name, (tensor, _) in given.items()}},
            dynamic_shapes={"row": {name: axes for name, (_, axes) in given.items()}},
            input_names=list(given),
            output_names=OUTPUTS,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        part.ClearField("metadata_props")  # large, and names paths of this machine
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
