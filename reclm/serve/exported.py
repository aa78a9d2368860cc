"""A folder of scripts/export.py as the engine of a Recommender: onnxruntime, without torch and pandas.

model.onnx     the graph of reclm/serve/step.py            items.parquet  number, id, title, genres, count
config.json    settings, what the model reads, hashes      README.md      for people
histories.npz  the users of the training data, only if they were asked for"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reclm.data.histories import FILE as HISTORIES
from reclm.errors import UserError, first_line
from reclm.serve.about import About
from reclm.serve.catalogue import Catalogue
from reclm.serve.person import Reads

FORMAT = 1  # raise it when the same folder would mean another model
GRAPH, ITEMS, CONFIG, README = "model.onnx", "items.parquet", "config.json", "README.md"
PAIRS = 2**21  # most query-key pairs of one pass, about 100 MB: larger batches are no faster on a CPU

Opened = tuple["OnnxEngine", Catalogue, Reads, About, Path | None]


def open_export(folder: Path) -> Opened:
    """What Recommender is made of, from a folder. Raises UserError for one that is not complete and as it was
    written, and where onnxruntime or pyarrow is not installed."""
    config = read_config(folder)
    try:
        for name in (GRAPH, ITEMS, *config["files"]):
            check_file(folder / name, config["files"][name])
        reads = Reads(**config["reads"])
        about = About(*(config[name] for name in ("config", "dataset", "protocol", "trained")))
        layout = Layout(**config["layout"])
        users = folder / HISTORIES if HISTORIES in config["files"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({first_line(error)}): export again") from None
    try:
        return OnnxEngine(open_graph(folder / GRAPH), layout), read_items(folder / ITEMS), reads, about, users
    except ImportError as error:
        raise missing(error) from None


def missing(error: ImportError) -> UserError:
    return UserError(f"{error.name} is not installed: pip install -r requirements-export.txt")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an export. Raises UserError for any other folder, and for another FORMAT."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version = config["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not an export, or its {CONFIG} is damaged") from None
    if version != FORMAT:
        raise UserError(f"{folder} was written by another version of this program: export again")
    return config


def check_file(path: Path, digest: str) -> None:
    """Raises UserError unless the file is there with this SHA-256."""
    if not path.is_file():
        raise UserError(f"{path} is missing: export again")
    if sha256(path) != digest:
        raise UserError(f"{path} is truncated or was edited: export again")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_items(path: Path) -> Catalogue:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(path).read(["id", "title", "genres", "count"], use_threads=False)
    ids, titles, genres, counts = (column.to_pylist() for column in table.columns)  # to_numpy needs pandas
    return Catalogue(ids, titles if titles != ids else (), genres, np.array(counts))


def open_graph(path: Path) -> Any:
    """The onnxruntime.InferenceSession of a graph, on OMP_NUM_THREADS threads [default: all cores]"""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdigit() else os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Waiting threads would keep cores from other programs; int8 weights are converted once, not per run.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Layout:
    """How a batch becomes the tokens of the graph."""

    first_profile: list[int]  # token id of code 0, per profile field
    request_time: bool
    most_actions: int  # of a session's row; then it is read again


@dataclass
class Row:
    """One person's history in the graph."""

    past: np.ndarray  # (L, 2, 1, G, P, Dh) keys and values of its P tokens
    times: np.ndarray  # (1, P) seconds, where the graph reads them
    last_time: np.ndarray  # (1, 1) seconds, of the last action
    in_past: int  # actions
    before: np.ndarray  # (1,) actions of the whole history


class OnnxEngine:
    """See reclm/serve/engine.py."""

    def __init__(self, graph: Any, layout: Layout):
        self.graph, self.layout = graph, layout
        shapes = {entry.name: entry.shape for entry in graph.get_inputs()}
        self.inputs = shapes.keys()
        self.past_shape = [size if isinstance(size, int) else 0 for size in shapes["past"]]
        one = {name: np.zeros((1, 1)) for name in ("timestamps", "next_timestamps")}
        codes = {name: np.zeros((1, 1), np.int64) for name in ("item_ids", "actions", "contexts")}
        counts = {"lengths": np.ones(1, np.int64), "num_before": np.zeros(1, np.int64)}
        profiles = {"profiles": np.zeros((1, len(layout.first_profile)), np.int64)}
        (self.table,) = self.run(["item_table"], self.lay_out(one | codes | counts | profiles))

    def run(
        self, outputs: list[str], row: dict[str, np.ndarray], past: Row | None = None
    ) -> list[np.ndarray]:
        """Outputs of the graph for tokens of `lay_out`, which follow those of a row, if given"""
        rows = len(row["token_ids"])
        shape = [*self.past_shape[:2], rows, *self.past_shape[3:]]
        row["past"] = np.zeros(shape, np.float32) if past is None else past.past
        row["past_times"] = np.zeros((rows, 0)) if past is None else past.times
        return self.graph.run(outputs, {name: row[name] for name in self.inputs})

    def lay_out(self, batch: dict[str, np.ndarray], row: Row | None = None) -> dict[str, np.ndarray]:
        """A batch -> all that a graph may read of it (reclm/serve/step.py), as reclm/nn/inputs.py lays it
        out: profile tokens, which have the time of the first action, then one token per action. With `row`,
        these are its next actions."""
        items = batch["item_ids"]
        offsets = [] if row is not None else self.layout.first_profile
        first = batch["profiles"] + offsets if len(offsets) else items[:, :0]  # (B, P)
        width = first.shape[1]

        def behind(prefix: np.ndarray, values: np.ndarray) -> np.ndarray:
            """(B, 1) for each profile token and (B, T) -> (B, P + T)"""
            return np.concatenate([prefix.repeat(width, 1), values], axis=1) if width else values

        before = (batch["num_before"] if row is None else row.before)[:, None]
        tokens = {
            "token_ids": np.concatenate([first, items], axis=1),
            "last": batch["lengths"] - 1 + width,
            "before": behind(before, before + np.arange(items.shape[1])),
        }
        for name in batch.keys() & {"actions", "contexts"}:
            tokens[name] = behind(np.zeros_like(before), batch[name])
        if "timestamps" in batch:
            begin = batch["timestamps"][:, :1]
            times, after = behind(begin, batch["timestamps"]), behind(begin, batch["next_timestamps"])
            tokens["timestamps"] = times
            tokens["query_times"] = after if self.layout.request_time else times
            tokens["since_last"] = np.diff(times, axis=1, prepend=begin if row is None else row.last_time)
            tokens["until_next"] = after - times
        return tokens

    def hidden(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        row = self.lay_out(batch)
        size = max(1, PAIRS // row["token_ids"].shape[1] ** 2)
        starts = range(0, len(row["last"]), size)
        parts = ({name: values[i : i + size] for name, values in row.items()} for i in starts)
        return np.concatenate([self.run(["hidden"], part)[0] for part in parts])

    def start(self, batch: dict[str, np.ndarray]) -> tuple[Row, np.ndarray]:
        tokens = self.lay_out(batch)
        hidden, past = self.run(["hidden", "present"], tokens)
        times = tokens.get("timestamps", np.zeros((1, 0)))
        lengths = batch["lengths"]
        return Row(past, times, times[:, -1:], int(lengths[0]), batch["num_before"] + lengths), hidden[0]

    def extend(self, state: Row, batch: dict[str, np.ndarray]) -> np.ndarray | None:
        if state.in_past >= self.layout.most_actions:
            return None
        tokens = self.lay_out(batch, state)
        hidden, state.past = self.run(["hidden", "present"], tokens, state)
        if "timestamps" in tokens:
            state.last_time = tokens["timestamps"]
            state.times = np.append(state.times, state.last_time, axis=1)
        state.in_past += 1
        state.before = state.before + 1
        return hidden[0]
