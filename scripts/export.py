"""Write a trained model as a folder that runs without torch, or as a page that runs without a server.

    python scripts/export.py --ckpt_name=runs/latest/best.pth --out=exported/
    python scripts/export.py --ckpt_name=runs/latest/best.pth --out=small/ --quantize=int4
    python scripts/export.py --ckpt_name=runs/latest/best.pth --out=films.html --format=html

`Recommender.load("exported/")` (reclm.serve) opens it like a checkpoint, with onnxruntime. The README.md in
it shows how to use model.onnx without this program. For --task=matching, not with --user_embedding=explicit
or --time_tokens=tokens.

The page is one HTML file with the weights as integers, for llama blocks without times and profiles; it works
from a folder and makes no request. Folder and page hold the titles of the items: see whether you may pass
them on.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.adapt.quantize import BITS, QuantizedRows, check_widths, group_size, unpack
from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, check_out, write_whole, writing
from reclm.run.report import commit, describe_rounding
from reclm.serve.catalogue import Catalogue
from reclm.serve.choose import add_model_flags, add_quantize, chosen_model
from reclm.serve.exported import CONFIG, FORMAT, GRAPH, HISTORIES, ITEMS, README, Layout, missing, sha256
from reclm.serve.hub import load_state, open_model
from reclm.serve.person import Reads
from reclm.serve.step import check_exportable, example, most_actions, write_graph
from reclm.serve.trained import open_checkpoint

FILES = (GRAPH, ITEMS, CONFIG, README, HISTORIES)
MEANINGS = {
    "token_ids": "int64: numbers of items.parquet, oldest first{profile}; 0 = padding, on the right only",
    "last": "int64: per row, the index of the token after which to recommend",
    "past": "float32: keys and values of earlier tokens of one row (`present` of the run before), or none",
    "timestamps": "float64: seconds since 1970 of each action",
    "query_times": "float64: seconds since 1970 {until}",
    "past_times": "float64: `timestamps` of the tokens in past",
    "since_last": "float64: seconds since the action before, 0 for the first",
    "until_next": "float64: seconds until the next action, of the last one until the request",
    "before": "int64: number of earlier actions of the whole history",
    "actions": "int64: code of the action's rating (from 1, see `reads` in config.json), 0 = unknown",
    "contexts": "int64: code of the action's context, 0 = unknown",
}


def main() -> None:
    parser = ScriptParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder, or .html file, to write")
    parser.add_argument(
        "--format", choices=["onnx", "html"], default="onnx", help="a folder or a page [onnx]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    add_quantize(parser)
    parser.add_argument(
        "--with_users", action="store_true", help="add what each user did (histories.npz): personal data"
    )
    args = parser.parse_args()
    if args.format == "html":
        return write_page(args)
    args.out = args.out.resolve()
    check_folder(args.out, args.overwrite)
    try:
        import onnxruntime  # noqa: F401 (to know it before the work)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing(error) from None
    work = args.out.with_name(f".{args.out.name}.writing")
    try:
        with writing(args.out):
            shutil.rmtree(work, ignore_errors=True)  # of a command that was killed
            work.mkdir()
            export(args, work)
            replace_folder(args.out, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = (args.out / GRAPH).stat().st_size
    print(f"wrote {args.out}: {GRAPH} has {size:,} bytes")


def write_page(args: argparse.Namespace) -> None:
    """Write the page. Raises UserError."""
    from reclm.serve.offline import write_offline_page

    if args.quantize != "none" or args.with_users:
        raise UserError("--quantize and --with_users are for --format=onnx: leave them out")
    check_out(args, [".html"])
    path = chosen_model(args)
    write_whole(args.out, lambda work: write_offline_page(path, work))
    print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes: open it in a browser")


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises UserError unless `out` lies in an existing folder and does not exist, or with `overwrite` holds
    nothing but an export."""
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"--out={out} exists: choose another name or add --overwrite")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not {GRAPH, CONFIG} <= names <= set(FILES):
        raise UserError(f"--out={out} is not an export and nothing else: choose another name")


def replace_folder(out: Path, work: Path) -> None:
    """Rename the folder `work` to `out`, which may exist."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def export(args: argparse.Namespace, work: Path) -> None:
    """Write all files to the folder `work`. Raises UserError for a model that cannot be exported."""
    path = chosen_model(args)
    opened = open_model(path) if path.is_dir() else open_checkpoint(path)
    engine, catalogue, reads, said, histories = opened
    model = engine.model
    check_exportable(model)
    if args.with_users and (histories is None or not histories.is_file()):
        raise UserError(f"--with_users: there is no {HISTORIES} beside {path}")
    trained = said.trained + describe_rounding(args.quantize)
    about = {"dataset": said.dataset, "protocol": said.protocol, "trained": trained}
    about |= {"fingerprint": load_state(path)["fingerprint"], "commit": commit()}
    write_graph(model, reads.times, about, work / GRAPH)
    if args.quantize != "none":
        quantize(work / GRAPH, model, args.quantize)
    write_items(catalogue, work / ITEMS)
    if args.with_users:
        shutil.copyfile(histories, work / HISTORIES)
    given = example(model, reads.times)
    layout = Layout(model.inputs.first_profile.tolist(), model.cfg.request_time, most_actions(model))
    about |= {"config": said.config, "reads": asdict(reads), "layout": asdict(layout)}
    inputs = {name: meaning(name, reads) for name in given}
    past = [1 if axis == 2 else 0 if axis == 4 else size for axis, size in enumerate(given["past"][0].shape)]
    readme = describe(about, inputs, catalogue, past, args.with_users)
    (work / README).write_text(readme, encoding="utf-8")
    files = {file.name: sha256(file) for file in sorted(work.iterdir())}
    config = {"format": FORMAT, **about, "inputs": inputs, "files": files}
    (work / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_items(catalogue: Catalogue, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "number": pa.array(range(1, len(catalogue) + 1), pa.int32()),
        "id": pa.array(catalogue.ids, pa.string()),
        "title": pa.array(catalogue.titles, pa.string()),
        "genres": pa.array(catalogue.genres, pa.string()),
        "count": pa.array(catalogue.counts, pa.int64()),
    }
    parquet.write_table(pa.table(columns), path)


def quantize(path: Path, model: nn.Module, kind: str) -> None:
    """Store in a graph of the model as integers what --quantize does elsewhere (reclm/adapt/quantize.py): the
    weights of the blocks, and the item table, which is both looked up and multiplied, once
    (onnxruntime.quantization would store it twice). The arithmetic stays float32. Raises UserError where
    groups do not divide a width."""
    import onnx

    check_widths(model, "quantize", kind)
    bits, proto = BITS[kind], onnx.load(path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    linears = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
    weights = [
        (model.item_table(), model.cfg.dim),
        *((part.weight, group_size(part, bits)) for part in linears),
    ]
    for weight, width in weights:
        rows, values = QuantizedRows(weight.reshape(-1, width), bits), weight.detach().numpy()
        for turned in (False, True):  # the exporter turns the weights of linear layers
            wanted = values.T if turned else values
            found = [name for name, array in stored.items() if np.array_equal(array, wanted)]
            if found:
                replace_weight(proto.graph, found[0], rows, values.shape, turned)
                del stored[found[0]]
                break
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def replace_weight(graph, name: str, rows: QuantizedRows, shape: tuple[int, ...], turned: bool) -> None:
    """Put codes, scales and offsets in the place of an initializer, and nodes that make floats of them, of
    this shape and then `turned`."""
    from onnx import TensorProto, helper, numpy_helper

    codes = rows.codes.numpy() if rows.bits == 8 else unpack(rows.codes).numpy()
    kind = TensorProto.UINT8 if rows.bits == 8 else TensorProto.UINT4
    content = codes if rows.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    graph.initializer.append(
        helper.make_tensor(f"{name}_codes", kind, codes.shape, content.tobytes(), raw=True)
    )
    parts = {"scale": rows.scale[:, 0].numpy(), "offset": rows.offset.numpy(), "shape": np.array(shape)}
    graph.initializer.extend(
        numpy_helper.from_array(array, f"{name}_{part}") for part, array in parts.items()
    )
    (old,) = (tensor for tensor in graph.initializer if tensor.name == name)
    graph.initializer.remove(old)
    steps = [  # operator, inputs, output
        ("Cast", ["scale"], "scale32"),
        ("Cast", ["offset"], "offset32"),
        ("DequantizeLinear", ["codes", "scale32"], "steps"),
        ("Add", ["steps", "offset32"], "rows"),
        ("Reshape", ["rows", "shape"], "weight"),
        ("Transpose" if turned else "Identity", ["weight"], ""),
    ]
    settings = {"Cast": {"to": TensorProto.FLOAT}, "DequantizeLinear": {"axis": 0}}
    for place, (operator, inputs, output) in enumerate(steps):
        names = [f"{name}_{part}" for part in inputs]
        made = f"{name}_{output}" if output else name
        graph.node.insert(place, helper.make_node(operator, names, [made], **settings.get(operator, {})))


# ---------------------------------------------------------------- README.md


def meaning(name: str, reads: Reads) -> str:
    until = "of the next action, of the last one of the request" if reads.request_time else "of each action"
    fields = ", ".join(reads.profile)
    profile = f", after one token each for {fields} (first ids in `layout` of config.json)" if fields else ""
    return MEANINGS[name].format(until=until, profile=profile)


CODE = """\
```python
import numpy as np, onnxruntime, pyarrow.parquet as parquet
items = parquet.read_table("items.parquet").to_pydict()
graph = onnxruntime.InferenceSession("model.onnx")
history = {ids}  # ids, oldest first
numbers = [items["number"][items["id"].index(item)] for item in history][-{max_len}:]
past = np.zeros({past}, np.float32)
row = {{"token_ids": np.array([numbers]), "last": np.array([len(numbers) - 1]), "past": past}}
scores = graph.run(["scores"], row)[0][0]
scores[[0, *numbers]] = -np.inf  # no item, and those of the history
print(*(items["title"][number - 1] for number in np.argsort(-scores)[:5]), sep="\\n")
```
"""

PROGRAM = """\
```python
from reclm.serve import Recommender
recommender = Recommender.load(".")
print(*(item.title for item in recommender.recommend({ids}, k=5)), sep="\\n")
```
"""
OUTPUTS = """\
The outputs are `hidden`, the user embedding; `scores` of all items, its products with the rows of
`item_table`; and `present`, to be the `past` of a run that adds actions to the row.
"""


def describe(about: dict, inputs: dict[str, str], catalogue: Catalogue, past: list[int], users: bool) -> str:
    """The README.md of an export; `about` is its config.json so far, `past` the shape of no past."""
    config, ids = about["config"], catalogue.ids[:3]
    plain = inputs.keys() == {"token_ids", "last", "past"} and not about["reads"]["profile"]
    rows = [f"| `{name}` | {text} |" for name, text in inputs.items()]
    settings = ("model_name", "dim", "n_layers", "n_heads", "max_len", "loss", "time_tokens", "request_time")
    return "\n".join(
        [
            f"# A recommender of {len(catalogue):,} items\n",
            "A sequence model (SASRec with LLaMA or HSTU blocks) that predicts the next item of a history.\n",
            f"- trained on {about['dataset']}: {about['protocol']}",
            f"- {about['trained']}",
            f"- data {about['fingerprint']}, code {about['commit']}",
            f"- {', '.join(f'{name} {config[name]}' for name in settings)}\n",
            "Five titles for a history, in this folder, after `pip install onnxruntime pyarrow`:\n"
            if plain
            else "Five titles for a history, with Toy-RecLM, which lays out what this model reads:\n",
            (CODE if plain else PROGRAM).format(ids=ids, max_len=config["max_len"], past=past),
            "The inputs of model.onnx:\n",
            "| input | meaning |\n|---|---|",
            *rows,
            f"\n{OUTPUTS}",
            f"`{HISTORIES}` has what each user of the training data did: personal data.\n" if users else "",
        ]
    )


if __name__ == "__main__":
    run_script(main)
