"""A checkpoint of main.py as the engine of a Recommender, with torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model import SequenceRecommender
from reclm.adapt.lora import check_fits, read_adapter, with_adapter
from reclm.adapt.many import ManyAdapters
from reclm.adapt.quantize import quantize_model
from reclm.config import Config, build_config
from reclm.data.histories import FILE
from reclm.errors import UserError
from reclm.metrics import choosing_metric
from reclm.nn.incremental import History, extend, is_full, read
from reclm.nn.pq import PQEmbedding
from reclm.run.checkpoint import load_checkpoint, load_weights, read_vocabulary
from reclm.run.process import check_memory, keep_freed_memory
from reclm.run.report import describe_rounding
from reclm.serve.about import About
from reclm.serve.catalogue import Catalogue
from reclm.serve.person import Reads
from reclm.serve.small_tables import PQTable, SmallTable

Opened = tuple["TorchEngine", Catalogue, Reads, About, Path | None]


def open_checkpoint(
    path: Path, device: str = "cpu", quantize: str = "none", merged: Path | None = None
) -> Opened:
    """What Recommender is made of, from a checkpoint file alone; the users are in histories.npz next to it.
    An adapter file `merged` becomes part of the weights; `quantize` is as --quantize. Raises UserError for a
    file that is missing, damaged, or older than what inference needs."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train first, or give the path of a .pth file")
    state = load_checkpoint(path)
    if merged is not None:
        state = with_adapter(state, path, merged)
    return *open_state(state, path, device, quantize), path.parent / FILE


def put_adapters(engine: "TorchEngine", path: Path, files: Sequence[Path]) -> list[str]:
    """Put adapters on the model of the checkpoint at `path`, to be chosen per person. Returns their names.
    Raises UserError for a file that is missing, damaged or of another base, and for two of one name."""
    state, adapters = load_checkpoint(path), {}
    for file in files:
        adapter = read_adapter(file)
        check_fits(adapter, file, state, path)
        if adapter.name in adapters:
            raise UserError(f"two adapters are called {adapter.name}: rename the file or folder of {file}")
        adapters[adapter.name] = adapter
    has_content = bool(state["vocabulary"]["features"])
    engine.many = ManyAdapters(engine.model, list(adapters.values()), has_content)
    return list(adapters)


def open_state(
    state: dict, path: Path, device: str, quantize: str
) -> tuple["TorchEngine", Catalogue, Reads, About]:
    """The same without the users, from the `state` of a checkpoint, or of a folder as reclm/serve/hub.py
    reads it, at `path`. Raises UserError."""
    keep_freed_memory()
    cfg, model = build_model(state, path)
    trained = describe_training(state) + describe_rounding(quantize, cfg.train.qat)
    about = About(cfg.flat(), state["dataset"], state["protocol"], trained)
    engine = TorchEngine(quantize_model(model.to(device), quantize))
    return engine, read_catalogue(state), read_reads(cfg, state), about


def build_model(state: dict, path: Path) -> tuple[Config, nn.Module]:
    """(settings, model) of a checkpoint, without the data. Raises UserError."""
    if "item_counts" not in state:
        raise UserError(f"{path} was written before recommendations existed: train again")
    cfg, vocabulary = build_config(state["config"]), read_vocabulary(state)
    check_memory(cfg, vocabulary)
    model = SequenceRecommender(cfg.model, cfg.loss, vocabulary)
    load_weights(model, state, path)
    return cfg, model


def read_catalogue(state: dict) -> Catalogue:
    items = state["items"]
    ids = items if isinstance(items, list) else items.tolist()
    return Catalogue(ids, state["titles"], state["genre_names"], state["item_counts"].numpy())


def read_reads(cfg: Config, state: dict) -> Reads:
    """What the model of a checkpoint reads of a person."""
    values = state["values"]
    codes = {name: values.get(name, []) for name in state["vocabulary"]["code_sizes"]}
    times = cfg.model.model_name == "hstu" or cfg.model.time_tokens != "none"
    return Reads(
        max_len=cfg.model.max_len,
        times=times and "last_time" in state,
        request_time=cfg.model.request_time,
        default_time=state.get("last_time", 0.0),
        codes=codes,
        profile={name: texts for name, texts in values.items() if name not in codes},
        vector_per_user=cfg.model.user_embedding == "explicit",
    )


def describe_training(state: dict) -> str:
    """ "epoch 18 (validation NDCG@10 .1802)" """
    rows = [row for row in state["history"] if row["epoch"] == state["progress"].get("epoch", 0) - 1]
    if not rows:
        return "no whole epoch"
    name, value = choosing_metric(rows[0], "valid/")
    return f"epoch {rows[0]['epoch']} (validation {name} {value:.4f})"


class TorchEngine:
    """See reclm/serve/engine.py."""

    many: ManyAdapters | None = None  # among which persons choose

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        if isinstance(model.item_embedding, PQEmbedding):
            self.table = PQTable(model.item_embedding)
            return
        with torch.inference_mode():
            table = model.item_table()
        if not isinstance(table, torch.Tensor):
            self.table = SmallTable(table)
            return
        # The content of items never changes any more: it becomes part of their vectors.
        model.item_embedding.weight.data, model.content = table.clone(), None
        self.table = model.item_embedding.weight.cpu().numpy()

    def tensors(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The batch for the next pass through the model, which then uses the adapters of its persons."""
        batch = {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}
        ids = batch.pop("adapter_ids", None)
        if self.many is not None:
            self.many.chosen.ids = ids
        return batch

    @torch.inference_mode()
    def score_update(
        self, hidden: np.ndarray, ids: np.ndarray, items: np.ndarray | slice
    ) -> np.ndarray | float:
        """ManyAdapters.score_update"""
        hidden, ids = (torch.from_numpy(array).to(self.device) for array in (hidden, ids))
        update = self.many.score_update(hidden, ids, items)
        return update.cpu().numpy() if isinstance(update, torch.Tensor) else update

    @torch.inference_mode()
    def hidden(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.model.encode(self.tensors(batch), last_only=True)[:, 0].cpu().numpy()

    def start(self, batch: dict[str, np.ndarray]) -> tuple[History, np.ndarray]:
        history = read(self.model, self.tensors(batch))
        return history, history.hidden[0].cpu().numpy()

    def extend(self, state: History, batch: dict[str, np.ndarray]) -> np.ndarray | None:
        if is_full(self.model, state):
            return None
        action = {name: tensor[:, 0] for name, tensor in self.tensors(batch).items() if tensor.dim() == 2}
        action.pop("profiles", None)
        return extend(self.model, state, action)[0].cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.model(self.tensors(batch)).double().sigmoid().float().cpu().numpy()
