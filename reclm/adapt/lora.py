"""--adapter: low-rank updates of a trained model whose own weights stay as they are. And --train_only.

    W x  ->  (W + (alpha / r) B A) x           LoRA (arXiv 2106.09685, section 4.1); at first B = 0
    W x  ->  m (W + (alpha / r) B A) / n x     DoRA (arXiv 2402.09353, eq. 5); n = lengths of the rows

The layers of the blocks are updated by peft. The item table is no layer that is called, but a matrix of which
rows and products are taken: its update is a parametrization. Weights that the base lacks, such as vectors of
new items, are trained whole and belong to the adapter.

A checkpoint of such a run has the merged weights as "model", so whatever reads checkpoints needs no adapter,
and base and updates as "trained". adapter.safetensors has what the adapter adds to its base:

    LAYER.lora_A (r, in), LAYER.lora_B (out, r), LAYER.magnitude (out,)   e.g. layers.0.attention.wq.lora_A
    item_embedding.lora_A (r, D), item_embedding.lora_B (V, r)
    item_embedding.places (n,), item_embedding.rows (n, D)   numbers and vectors of new items
    any other name   a weight that the base lacks"""

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reclm.config import Config
from reclm.errors import UserError, first_line
from reclm.run.init_from import ITEMS, Base, hash_weights
from reclm.run.output import write_whole

ALPHA = 16.0  # over r, so that one learning rate suits all ranks (arXiv 2106.09685, section 4.1)
TABLE, FILE = "table", "adapter.safetensors"
INSTALL = "pip install -r requirements-adapt.txt"
TRAINED = {"blocks": ("layers.", "norm."), "table": ("item_embedding.", "content.")}  # by --train_only
ABOUT = ("kind", "rank", "alpha", "targets", "base", "base_name", "items")  # of a file
FORMAT = "toy-reclm-adapter"
PARTS = ("lora_A", "lora_B", "magnitude", "rows", "places")
NAMES = (  # in the state of an adapted model -> in a file
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"\.(lora_A|lora_B)\.default\.weight$"), r".\1"),
    (re.compile(r"\.lora_magnitude_vector\.default\.weight$"), ".magnitude"),
    (re.compile(r"\.parametrizations\.weight\.original$"), ".weight"),
    (re.compile(r"\.parametrizations\.weight\.0\.(lora_A|lora_B|rows|places)(\.weight)?$"), r".\1"),
)


class TableUpdate(nn.Module):
    """The item table (V, D) with trained vectors of new items, and unless `r` is 0 + (alpha / r) B A. Made of
    modules, so that the optimizer decays their weights as those of layers and tables."""

    def __init__(self, table: Tensor, new_items: Tensor, r: int):
        super().__init__()
        (size, width), self.r, self.has_rows = table.shape, r, bool(len(new_items))
        if self.has_rows:
            self.register_buffer("places", new_items.to(table.device))
            self.rows = nn.Embedding.from_pretrained(table[self.places].clone(), freeze=False)
        if r:
            self.lora_A = nn.Linear(width, r, bias=False, device=table.device)
            self.lora_B = nn.Embedding(size, r, device=table.device)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, table: Tensor) -> Tensor:
        """(V, D) -> (V, D)"""
        if self.has_rows:
            table = table.index_copy(0, self.places, self.rows.weight)
        return table + ALPHA / self.r * self.lora_B.weight @ self.lora_A.weight if self.r else table


# ---------------------------------------------------------------- train


def adapt(model: nn.Module, cfg: Config, base: Base | None) -> Base | None:
    """Freeze the weights that `base` gave the model but for those of --train_only, and add the updates of
    --adapter, in place. Returns the base; without these flags None, and nothing has changed. Raises
    UserError without peft, for an unknown target and for a rank larger than a layer."""
    settings = cfg.adapt
    if base is None or (settings.adapter == "none" and settings.train_only == "all"):
        return None
    torch.manual_seed(cfg.train.seed)  # the same first A in every process
    of_table = False
    if settings.adapter != "none":
        of_table, layers = find_targets(model, cfg)
        if of_table and ITEMS in base.fresh:
            raise UserError("--adapter_targets=table has no effect: the whole table is new and trained")
        inject(model, cfg, layers)
    table = model.item_embedding
    kept = TRAINED.get(settings.train_only, ())
    for name, weight in model.named_parameters():
        plain = plain_name(name)
        added = plain.rpartition(".")[2] in PARTS
        weight.requires_grad_(added or plain in base.fresh or plain.startswith(kept))
    if not table.weight.requires_grad and (of_table or len(base.new_items)):
        update = TableUpdate(table.weight.detach(), base.new_items, of_table * settings.adapter_rank)
        parametrize.register_parametrization(table, "weight", update)
    return base


def find_targets(model: nn.Module, cfg: Config) -> tuple[bool, list[str]]:
    """(is the item table a target?, names of the layers that --adapter_targets names). Raises UserError."""
    found = {}
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, nn.Linear):
            found.setdefault(name.rpartition(".")[2], {})[name] = min(module.weight.shape)
    wanted = [name.strip() for name in (cfg.adapt.adapter_targets or "").split(",") if name.strip()]
    wanted = wanted or [name for name in found if name.startswith("w")]
    sizes = found | {TABLE: {TABLE: min(model.item_embedding.weight.shape)}}
    for name in wanted:
        if name not in sizes:
            raise UserError(f"--adapter_targets: there is no layer {name!r:.60}, but {', '.join(sizes)}")
        if cfg.adapt.adapter_rank > (most := min(sizes[name].values())):
            raise UserError(
                f"--adapter_rank={cfg.adapt.adapter_rank} is larger than {name}: it must be at most {most}"
            )
    return TABLE in wanted, [layer for name in dict.fromkeys(wanted) for layer in found.get(name, ())]


def inject(model: nn.Module, cfg: Config, layers: list[str]) -> None:
    """Put the updates of peft around these layers."""
    with hidden("torchvision", "torchao"):
        try:
            import peft
        except ImportError as error:
            raise UserError(f"--adapter needs peft ({first_line(error)}): {INSTALL}") from None
        if layers:
            r, dora = cfg.adapt.adapter_rank, cfg.adapt.adapter == "dora"
            config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=layers, use_dora=dora)
            peft.inject_adapter_in_model(config, model)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Packages that peft would import where they are installed, and fail with if they were built for another
    torch, although plain layers need neither."""
    here = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(here))  # None: cannot be found
    try:
        yield
    finally:
        for name in here:
            del sys.modules[name]


# ---------------------------------------------------------------- weights


def split_weights(model: nn.Module, base: Base) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under the names of a plain model, weights of the adapter) of an adapted model; those that the
    base lacks are among both."""
    weights, own = {}, {}
    for name, tensor in model.state_dict().items():
        name = plain_name(name)
        (own if name.rpartition(".")[2] in PARTS else weights)[name] = tensor
    return weights, own | {name: weights[name] for name in base.fresh}


def plain_name(name: str) -> str:
    for pattern, plain in NAMES:
        name = pattern.sub(plain, name)
    return name


def merge(weights: dict[str, Tensor], own: dict[str, Tensor], alpha: float = ALPHA) -> dict[str, Tensor]:
    """Plain weights with those of an adapter in them, by the equations above."""
    merged = weights | {name: tensor for name, tensor in own.items() if name.rpartition(".")[2] not in PARTS}
    for name in own:
        layer, _, part = name.rpartition(".")
        if part == "rows":
            merged[ITEMS] = merged[ITEMS].index_copy(0, own[f"{layer}.places"], own[name])
    for name in own:
        layer, _, part = name.rpartition(".")
        if part == "lora_A":
            weight = merged[f"{layer}.weight"] + alpha / len(own[name]) * own[f"{layer}.lora_B"] @ own[name]
            if f"{layer}.magnitude" in own:
                weight *= (own[f"{layer}.magnitude"] / weight.norm(dim=1))[:, None]
            merged[f"{layer}.weight"] = weight
    return merged


def merged_weights(model: nn.Module, base: Base) -> dict[str, Tensor]:
    """The weights of a model without adapters that gives the same scores."""
    return merge(*split_weights(model, base))


def read_base(state: dict, model: nn.Module, path: Path) -> Base | None:
    """The base of the run of a checkpoint, None where it had none. Raises UserError unless it fits."""
    if "base" not in state:
        return None
    base, size = Base(**state["base"]), len(model.item_embedding.weight)
    known = set(base.fresh) <= model.state_dict().keys()
    if not known or not ((base.new_items > 0) & (base.new_items < size)).all():
        raise UserError(f"{path} is damaged or foreign: its base does not fit; use another --resume")
    return base


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Adapter:
    """An adapter as its file describes it."""

    name: str
    kind: str  # lora or dora
    rank: int
    alpha: float
    targets: str
    base: str  # hash_weights of its base
    base_name: str
    items: str  # hash_items of the data it was trained on
    weights: dict[str, Tensor]


def hash_items(items: np.ndarray | Tensor | list) -> str:
    """Hash of the ids of items in their order, 16 hex digits."""
    ids = items if isinstance(items, list) else items.tolist()
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()[:16]


def write_adapter(path: Path, model: nn.Module, base: Base, cfg: Config, items: np.ndarray) -> None:
    """Write the file of an adapted model; `items` are the ids of its data."""
    import safetensors.torch  # peft needs it, too

    own = split_weights(model, base)[1]
    own = {name: weight.detach().cpu().contiguous() for name, weight in own.items()}
    about = {
        "format": FORMAT,
        "kind": cfg.adapt.adapter,
        "rank": str(cfg.adapt.adapter_rank),
        "alpha": str(ALPHA),
        "targets": cfg.adapt.adapter_targets or "all",
        "base": base.weights,
        "base_name": base.name,
        "items": hash_items(items),
    }
    write_whole(path, lambda work: safetensors.torch.save_file(own, work, metadata=about))


def read_adapter(path: Path) -> Adapter:
    """Raises UserError for a file that is missing, damaged or no adapter."""
    if not path.is_file():
        raise UserError(f"there is no adapter {path}: give the path of an {FILE}")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"an adapter needs safetensors ({first_line(error)}): {INSTALL}") from None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        values = {name: about[name] for name in ABOUT}
        values |= {"rank": int(about["rank"]), "alpha": float(about["alpha"])}
        if about["format"] != FORMAT:
            raise KeyError("format")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or no adapter ({first_line(error)}): choose another") from None
    return Adapter(name_of(path), **values, weights=weights)


def name_of(path: Path) -> str:
    """The name of an adapter: that of its file, or where this is FILE of its run."""
    return path.resolve().parent.name if path.name == FILE else path.stem


def check_fits(adapter: Adapter, path: Path, state: dict, base: Path) -> None:
    """Raises UserError unless the adapter read from `path` was trained on the checkpoint `base`, with this
    `state`, and on the same items."""
    found = hash_weights(state["model"])
    if found != adapter.base:
        raise UserError(
            f"{path} adapts {adapter.base_name} (weights {adapter.base}), not {base} (weights {found}): give "
            "the checkpoint that it was trained from"
        )
    lacking = [name for name in adapter.weights if name.rpartition(".")[2] not in PARTS]
    if hash_items(state["items"]) != adapter.items or lacking:
        what = (
            f"has weights that {base} lacks ({lacking[0]:.60})" if lacking else "was trained on other items"
        )
        raise UserError(f"{path} {what}, so it cannot be put on {base}: use best.pth of its run")
    for name, tensor in adapter.weights.items():
        layer, _, part = name.rpartition(".")
        weight, r = state["model"].get(f"{layer}.weight"), adapter.rank
        rows, columns = weight.shape if weight is not None and weight.dim() == 2 else (0, 0)
        shapes = {"lora_A": (r, columns), "lora_B": (rows, r), "magnitude": (rows,)}
        other = {"lora_A": "lora_B"}.get(part, "lora_A")
        good = r and rows and tensor.shape == shapes.get(part) and tensor.is_floating_point()
        if not good or f"{layer}.{other}" not in adapter.weights:
            raise UserError(f"{path} is damaged: {name:.80} does not fit {base}; choose another")


def with_adapter(state: dict, base: Path, path: Path) -> dict:
    """The state of the checkpoint `base` with the adapter in the file `path` merged into its weights. Raises
    UserError unless they belong together."""
    adapter = read_adapter(path)
    check_fits(adapter, path, state, base)
    return state | {"model": merge(state["model"], adapter.weights, adapter.alpha)}
