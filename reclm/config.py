"""All settings: dataclass sections, overridden by a YAML file, overridden by flags.

Names are unique over the sections, so flags and YAML keys need no prefix: `--lr=5e-4 --n_layers=4`.
The text under each field is its help text (`python main.py --help`).
"""

import math
import os
import re
from argparse import ArgumentError
from argparse import ArgumentParser as ArgumentParserOfPython
from dataclasses import asdict, dataclass, fields
from typing import Literal

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from reclm.errors import UserError


@dataclass
class ModelConfig:
    """Model: fixed by the checkpoint once trained"""

    task: Literal["matching", "ctr"] = "matching"
    """matching = rank the whole catalogue by what comes next; ctr = how likely is it that the user likes what
    is shown (reclm/impressions.py)"""
    model_name: Literal["llama", "hstu"] = "llama"
    """kind of block: LLaMA2 (model.py) or HSTU (reclm/hstu.py)"""
    max_len: int = 200
    """T: a user's history is cut to the last max_len actions"""
    dim: int = 64
    """D: model width"""
    n_layers: int = 2
    """number of blocks"""
    n_heads: int = 2
    """H: query heads"""
    n_kv_heads: int = 0
    """G: key-value heads of grouped-query attention; 0 = as many as n_heads"""
    hidden_dim: int = 0
    """F: feed-forward width; 0 = 8/3 dim, rounded up to a multiple of 32"""
    window: int = 0
    """W: attend to the last `window` positions only; 0 = to all"""
    attention_norm: Literal["length", "max_len"] = "length"
    """hstu: attention is divided by the number of positions attended to, or always by max_len"""
    position_embedding: bool = False
    """add to each item's embedding one of the number of actions before it (reclm/positions.py)"""
    profile_tokens: bool = False
    """begin each row with tokens of the user's profile: gender, age, ... (reclm/inputs.py)"""
    time_tokens: Literal["none", "tokens", "embedding"] = "none"
    """the time since the action before: a token of its own, with hour and weekday where a session begins, or
    an embedding added to the item's (reclm/intervals.py)"""
    action_embedding: bool | None = None
    """add to each item's embedding one of the rating it was given [default: true with task=ctr]"""
    item_features: str | None = None
    """know items by content, too: a comma-separated list of genres, year, title (of the item table) and paths
    of .npy or .safetensors files with one row an item"""
    id_dropout: float = 0.0
    """share of the items that go without their id in a training step: content learns to stand alone"""
    time_head: bool = False
    """learn the distribution of the time to the next action as well (reclm/next_time.py)"""
    request_time: bool = False
    """the model knows WHEN the item to predict was chosen, through hstu's bias and time_tokens; name it
    beside every number"""
    gated_residuals: bool = False
    """llama: a learned gate on each residual branch (LiGR, arXiv 2502.03417)"""
    dropout: float = 0.2
    """on the embedding and on the residual branches"""
    user_embedding: Literal["none", "explicit"] = "none"
    """explicit = add a learned vector per user (SASRec, section III.E)"""
    scores: Literal["dot", "cosine"] = "dot"
    """MF layer: dot product, or cosine divided by `temperature`"""
    temperature: float = 0.05
    """of cosine scores"""
    norm_eps: float = 1e-6
    """of RMSNorm"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the blocks; embeddings, loss and ranking stay in float32"""

    def __post_init__(self):
        if self.action_embedding is None:
            self.action_embedding = self.task == "ctr"
        positive(self, "max_len", "dim", "n_layers", "n_heads", "temperature", "norm_eps")
        not_negative(self, "n_kv_heads", "hidden_dim", "window")
        probability(self, "dropout")
        probability(self, "id_dropout")
        if self.id_dropout and not self.item_features:
            raise UserError(f"--id_dropout={self.id_dropout} needs --item_features: leave it out")
        if self.task == "ctr" and self.time_tokens == "tokens":
            raise UserError("--time_tokens=tokens is for --task=matching: use --time_tokens=embedding")
        if self.time_head and self.request_time:
            raise UserError("--request_time=true tells what --time_head=true is to predict: drop one")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise UserError(f"--dim={self.dim} must split into --n_heads={self.n_heads} heads of even width")
        if self.n_heads % self.kv_heads:
            raise UserError(f"--n_heads={self.n_heads} must be a multiple of --n_kv_heads={self.n_kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def ffn_dim(self) -> int:
        return self.hidden_dim or 32 * math.ceil(self.dim * 8 / 3 / 32)


@dataclass
class DataConfig:
    """Data"""

    dataset: str | None = None
    """ml-1m, ml-1m-sasrec, ml-1m-m1, ml-100k, movielens-latest-x1 (ctr), or a path to a .csv or .parquet
    file with the columns user,item[,rating][,timestamp][,label][,context][,split]; not given: MovieLens-1M,
    or what can be had of it"""
    data_dir: str | None = None
    """where data files are looked for and downloaded to [default: $RECLM_DATA, else data/]"""
    min_item_count: int = 1
    """drop items with fewer interactions (5 on ml-1m gives the sequences of ml-1m-sasrec)"""
    shuffle_ties: int = 0
    """seed: actions of the same user and second in a random order; 0 = in the order of the file"""
    cold_items: float = 0.0
    """share of the items to keep out of training and to be the test items, for a cold-start evaluation"""
    ctr_split: Literal["time", "random", "own"] | None = None
    """what trains, validates and tests a ranker, 8:1:1: by the span of time, at random, or as the column
    split says [default with task=ctr: own where there is that column, else time]; with task=matching: learn
    from the training part alone, for init_from"""
    ctr_history: Literal["past", "train"] | None = None
    """ctr: an impression sees all that its user did before it, or of that only what trains [default: past
    with ctr_split=time, else train]"""
    positive_from: float = 4.0
    """ctr: a rating of this or more is positive (a column label says it itself)"""
    drop_rating: float | None = None
    """ctr: drop what was rated so"""
    min_positives: int = 0
    """ctr: drop users and items with fewer positives, until all have them"""
    utc_offset: float = 0.0
    """hours that the days of ctr_split=time are ahead of UTC"""
    split_seed: int = 0
    """of ctr_split=random"""
    unordered_ok: bool = False
    """accept ml-1m-m1 without ratings.dat, although its lists are not in order of time"""

    def __post_init__(self):
        positive(self, "min_item_count")
        not_negative(self, "shuffle_ties", "min_positives", "split_seed")
        for name in ("positive_from", "drop_rating", "utc_offset"):
            finite(self, name)
        probability(self, "cold_items")

    @property
    def folder(self) -> str:
        return self.data_dir or os.environ.get("RECLM_DATA") or "data"


@dataclass
class LossConfig:
    """Loss"""

    loss: Literal["bce", "gbce", "sampled_softmax", "softmax"] = "bce"
    """binary cross entropy (SASRec), generalised BCE (gSASRec), softmax over negatives or over all"""
    num_negatives: int = 1024
    """N: negatives a position is compared with (softmax uses all items instead)"""
    share_negatives: bool = True
    """true = one draw for the whole batch (fast); false = a draw for every position (SASRec)"""
    exclude_history: bool = True
    """compare with no item of the user's training history, as none is ranked either; false = only the
    target is excluded"""
    negative_below: float | None = None
    """actions with a lower rating are negative feedback: seen in the history, never a target of the loss"""
    time_weight: float = 0.1
    """of the next-time loss, with time_head"""
    gbce_t: float = 0.75
    """calibration of gbce: 0 = plain BCE, 1 = fully calibrated"""

    def __post_init__(self):
        positive(self, "num_negatives", "time_weight")
        probability(self, "gbce_t", closed=True)
        finite(self, "negative_below")


@dataclass
class TrainConfig:
    """Training"""

    num_epochs: int = 20
    """epochs 0 .. num_epochs - 1"""
    batch_size: int = 32
    """sequences in an optimizer step, over ALL ranks: a recipe means the same on any number of them"""
    pad_to: Literal["longest", "max_len"] = "longest"
    """width of a batch: its longest sequence, or always max_len (same losses, more work)"""
    lr: float = 3e-3
    """peak learning rate of AdamW"""
    weight_decay: float = 0.01
    """on the matrices of the blocks; norms have none"""
    embedding_decay: float = 0.0
    """weight decay on the embeddings"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up; cosine ends at lr_min"""
    warmup_steps: int = 100
    """steps of linear warm-up"""
    lr_min: float = 0.1
    """final learning rate of the cosine, as a fraction of lr"""
    clip_norm: float = 1.0
    """largest norm of the gradient; 0 = no clipping"""
    grad_accum_steps: int = 1
    """cut each batch into this many passes to save memory; the result is the same"""
    patience: int = 0
    """stop after this many epochs without a better validation; 0 = never"""
    seed: int = 0
    """of initial weights, order, dropout and negatives"""
    init_from: str | None = None
    """start from the weights of this checkpoint that this model has, too: matching can start a ranker"""
    compile: bool = False
    """torch.compile the blocks (first steps take a minute)"""
    random_windows: float = 0.0
    """share of the histories longer than max_len that train on a random part instead of the last one"""
    ema: float = 0.0
    """evaluate an exponential moving average of the weights, with this decay a step; 0 = the weights"""
    keep_last: int = 20
    """keep the newest epoch_N.pth files (best.pth and last.pth are always kept); 0 = all"""

    def __post_init__(self):
        positive(self, "num_epochs", "batch_size", "lr", "grad_accum_steps")
        not_negative(self, "weight_decay", "embedding_decay", "warmup_steps", "clip_norm")
        not_negative(self, "patience", "seed", "keep_last")
        probability(self, "lr_min", closed=True)
        probability(self, "random_windows", closed=True)
        probability(self, "ema")
        if self.seed >= 2**32:
            raise UserError(f"--seed={self.seed} must be below 2**32")


@dataclass
class EvalConfig:
    """Evaluation"""

    filter_seen: bool = True
    """leave items of the user's history out of the ranking"""
    eval_batch_size: int = 256
    """users scored at once"""

    def __post_init__(self):
        positive(self, "eval_batch_size")


@dataclass
class RunConfig:
    """Run: not part of a checkpoint"""

    eval_only: bool = False
    """true = evaluate a checkpoint instead of training"""
    ckpt_name: str = "best.pth"
    """the checkpoint that eval_only reads, a file in out_dir or a path; --keep_last spares it"""
    out_dir: str | None = None
    """where results go [default: a new runs/<time>-<dataset>-<model>; eval_only, resume: runs/latest]"""
    resume: str | None = None
    """auto = go on from last.pth in out_dir, or start where there is none; or a path to a checkpoint"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one"""


@dataclass
class Config:
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    train: TrainConfig
    eval: EvalConfig
    run: RunConfig

    def flat(self) -> dict:
        """{name: value} of what belongs to the trained model: all sections but the one of this run."""
        parts = asdict(self)
        del parts["run"]
        return {name: value for part in parts.values() for name, value in part.items()}


SECTIONS = {field.name: field.type for field in fields(Config)}


IMPRESSIONS = {"task": ("ctr",), "ctr_split": ("time", "random", "own")}
# A setting other than its default has an effect only where one of these others has one of these values.
NEEDS = {
    "n_kv_heads": {"model_name": ("llama",)},
    "hidden_dim": {"model_name": ("llama",)},
    "attention_norm": {"model_name": ("hstu",)},
    "gated_residuals": {"model_name": ("llama",)},
    "request_time": {"model_name": ("hstu",), "time_tokens": ("tokens", "embedding")},
    "cold_items": {"exclude_history": (True,)},
    "time_weight": {"time_head": (True,)},
    "num_negatives": {"loss": ("bce", "gbce", "sampled_softmax")},
    "share_negatives": {"loss": ("bce", "gbce", "sampled_softmax")},
    "gbce_t": {"loss": ("gbce",)},
    "temperature": {"scores": ("cosine",)},
    "lr_min": {"schedule": ("cosine",)},
    "ctr_history": {"task": ("ctr",)},
    "positive_from": IMPRESSIONS,
    "drop_rating": IMPRESSIONS,
    "min_positives": IMPRESSIONS,
    "utc_offset": IMPRESSIONS,
    "split_seed": IMPRESSIONS,
}
NO_RANKER = (
    "min_item_count", "cold_items", "time_head", "request_time", "scores", "loss", "num_negatives",
    "share_negatives", "exclude_history", "negative_below", "filter_seen",
)  # fmt: skip


def build_config(values: dict) -> Config:
    """Config from {name: value}; what is missing keeps its default. Raises UserError."""
    sections = {
        section: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        for section, cls in SECTIONS.items()
    }
    cfg = Config(**sections)
    flat, defaults = cfg.flat(), {f.name: f.default for cls in SECTIONS.values() for f in fields(cls)}
    matching = {name: {"task": ("matching",)} for name in NO_RANKER}
    for name, others in [*NEEDS.items(), *matching.items()]:
        if flat[name] != defaults[name] and not any(
            flat[other] in useful for other, useful in others.items()
        ):
            with_others = " ".join(f"--{other}={flat[other]}" for other in others)
            raise UserError(f"--{name}={flat[name]} has no effect with {with_others}: leave it out")
    if cfg.data.cold_items and not cfg.loss.share_negatives:
        raise UserError("--cold_items keeps items out of the loss, --share_negatives=false cannot: drop one")
    if cfg.loss.exclude_history and not cfg.eval.filter_seen:
        raise UserError(
            "--filter_seen=false ranks the items of the history, but the loss leaves them out: "
            "train with --exclude_history=false"
        )
    return cfg


def parse_args(argv: list[str] | None = None) -> dict:
    """{name: value} of what the user SAID, in YAML files (`--config`) or in flags. Raises UserError."""
    files = ArgumentParserOfPython(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        chosen, flags = files.parse_known_args(argv)
    except ArgumentError as error:
        raise UserError(f"{error} (--config=FILE.yaml)") from None
    said = {}
    for path in chosen.config:  # flags win over files, wherever they stand on the line
        said |= parse([f"--config={path}"], f"{path}: ")
    return said | parse(flags, "")


def parse(argv: list[str], where: str) -> dict:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # help texts of the fields above
    parser = ArgumentParser(prog="main.py", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the names below")
    for cls in SECTIONS.values():
        parser.add_class_arguments(cls, None, as_group=True)
    try:
        said = vars(parser.parse_args(argv, defaults=False))
    except (ArgumentError, TypeError, ValueError) as error:
        # jsonargparse explains over several lines, in terms of its own; ours is one line about a name.
        text = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(str(error).split()))
        text = re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", text)
        raise UserError(f"{where}{text} (python main.py --help lists all names)") from None
    said.pop("config", None)
    return said


def positive(cfg, *names: str) -> None:
    for name in names:
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name}={getattr(cfg, name)} must be greater than 0")


def not_negative(cfg, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name}={getattr(cfg, name)} must not be negative")


def probability(cfg, name: str, closed: bool = False) -> None:
    value = getattr(cfg, name)
    if not (0 <= value < 1 or (closed and value == 1)):
        raise UserError(f"--{name}={value} must be between 0 and 1")


def finite(cfg, name: str) -> None:
    value = getattr(cfg, name)
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{name}={value} must be a number")
