"""The page without a server: page.html with the items and the weights of a model in it, and offline.js, which
answers its requests by computing. One HTML file that makes no request, to be opened from a folder.

Weights are integers with one float32 scale per row: at dim 64, 68 bytes per item rather than 256."""

import base64
import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from reclm.errors import UserError
from reclm.nn.layers import PLACE_BUCKETS
from reclm.serve.recommender import Recommender

FOLDER = Path(__file__).parent
REFUSED = {  # what offline.js does not compute: setting -> the values that it knows
    "task": ("matching",),
    "model_name": ("llama",),
    "profile_tokens": (False,),
    "time_tokens": ("none",),
    "user_embedding": ("none",),
    "item_table": ("dense",),
}
TABLE_LARGEST, BLOCK_LARGEST = 127, 255  # items are most of the weights: 8 bits; the blocks 9
PAGE_SCRIPT = '<script type="module">'
LIMITS = {"k": 200, "history": 1000, "why": 50}


def write_offline_page(checkpoint: str | Path, out: str | Path) -> int:
    """Write the page of a checkpoint -> its bytes. Raises UserError for a model whose settings it cannot
    compute, and as Recommender.load does."""
    recommender = Recommender.load(checkpoint)
    if not hasattr(recommender.engine, "model"):
        raise UserError(f"{checkpoint} is an export already: name the checkpoint that it was made from")
    check(recommender)
    page = (FOLDER / "page.html").read_text()
    packed, script = compress(recommender), (FOLDER / "offline.js").read_text()
    # Ascii85 is 6 % shorter than base64. It has no "v"; "<" might begin a tag.
    data = base64.a85encode(packed, pad=True).decode().replace("<", "v")
    element = f'<script type="text/plain" id="data" data-bytes="{len(packed)}">{data}</script>'
    ours = f"{element}\n<script>\n{script}</script>\n"
    page = page.replace("connect-src 'self'; ", "").replace(PAGE_SCRIPT, ours + PAGE_SCRIPT)
    content, out = page.encode(), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
    return len(content)


def check(recommender: Recommender) -> None:
    """Raises UserError for a model that offline.js does not know."""
    config = recommender.about.config
    for setting, known in REFUSED.items():
        if config[setting] not in known:
            value = str(config[setting]).lower()
            raise UserError(
                f"a page without a server cannot compute --{setting}={value}: use scripts/serve.py"
            )
    if "contexts" in recommender.reads.codes:
        raise UserError("a page cannot compute contexts by itself: use scripts/serve.py")


def compress(recommender: Recommender) -> bytes:
    """All that offline.js reads, with gzip: 4 bytes, the length of a JSON text; the text; the weights, which
    it describes by their place after it"""
    weights = bytearray()
    text = json.dumps(contents(recommender, weights), ensure_ascii=False).encode()
    return gzip.compress(len(text).to_bytes(4, "little") + text + weights, mtime=0)


def contents(recommender: Recommender, weights: bytearray) -> dict[str, Any]:
    """The JSON text; the weights are appended to `weights`."""
    catalogue = recommender.catalogue
    names = sorted(set(catalogue.genres))
    places = {name: place for place, name in enumerate(names)}
    return {
        "model": describe(recommender),
        "ids": catalogue.ids,
        "titles": catalogue.titles,
        "genres": {"names": names, "of": [places[name] for name in catalogue.genres]},
        "counts": catalogue.counts.tolist(),
        "net": pack_model(recommender.engine.model, partial(pack, weights)),
    }


def describe(recommender: Recommender) -> dict[str, Any]:
    """The answer to GET /model, and what offline.js leaves out by default"""
    seen = recommender.about.config["filter_seen"] is False
    return recommender.describe() | {"users": 0, "limits": LIMITS, "includes_seen": seen}


Pack = Callable[..., dict[str, int]]  # `pack` with its first argument


def pack_model(model: nn.Module, pack: Pack) -> dict[str, Any]:
    cfg, inputs = model.cfg, model.inputs
    places, ratings = inputs.position_embedding, inputs.code_embeddings
    return {
        "dim": cfg.dim,
        "heads": cfg.n_heads,
        "kvHeads": cfg.kv_heads,
        "window": cfg.window,
        "table": pack(model.item_embedding.weight, TABLE_LARGEST),
        "layers": [pack_layer(layer, pack) for layer in model.layers],
        "norm": model.norm.weight.tolist(),
        "places": pack(places.embedding.weight) if places is not None else None,
        "placeBuckets": PLACE_BUCKETS[0],
        "placeWidth": PLACE_BUCKETS[1],
        "ratings": pack(ratings["actions"].weight) if "actions" in ratings else None,
    }


def pack_layer(layer: nn.Module, pack: Pack) -> dict[str, Any]:
    packed = {name: pack(getattr(layer.attention, name).weight) for name in ("wq", "wk", "wv", "wo")}
    packed |= {name: pack(getattr(layer.feed_forward, name).weight) for name in ("w1", "w2", "w3")}
    for name, residual in (("attentionGate", layer.attention_residual), ("ffnGate", layer.ffn_residual)):
        packed[name] = pack(residual.gate.weight) if residual.gate is not None else None
    norms = {"attentionNorm": layer.attention_norm, "ffnNorm": layer.ffn_norm}
    return packed | {name: norm.weight.tolist() for name, norm in norms.items()}


def pack(weights: bytearray, weight: Tensor, largest: int = BLOCK_LARGEST) -> dict[str, int]:
    """Append a matrix (R, C) of integers: their low bytes, their high bytes if any can be needed, and per row
    the float32 scale that makes its largest value `largest`."""
    rows = weight.detach().float().cpu().numpy()
    scales = (np.abs(rows).max(1, keepdims=True) / largest).astype("<f4")
    values = np.rint(rows / np.where(scales == 0, 1, scales)).astype("<i2" if largest > 127 else "i1")
    place = len(weights)
    weights += values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes() + scales.tobytes()
    return {"rows": rows.shape[0], "width": rows.shape[1], "bytes": values.itemsize, "at": place}
