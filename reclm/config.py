"""All settings, as dataclass sections. reclm/flags.py fills them from YAML files and flags.

Names are unique over the sections, so flags and YAML keys need no prefix: `--lr=5e-4 --n_layers=4`.
The text under each field is its help text (`python main.py --help`).
"""

import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from reclm.errors import UserError

# What fixes a setting once a model is trained, named on each field:
#   model, data  every use of a checkpoint: evaluation, resume
#   trajectory   a resumed run, whose weights depend on it
#   leak         --init_from: with another value the checkpoint may have learned from this run's test data
#   free         nothing
PARTS = ("model", "data", "trajectory", "leak", "free")


class AnyBut(list):
    """All values but those listed."""

    def __contains__(self, value: Any) -> bool:
        return not super().__contains__(value)


MATCHING = {"task": ("matching",)}
CTR = {"task": ("ctr",)}
IMPRESSIONS = CTR | {"ctr_split": ("time", "random", "own")}
LLAMA = {"model_name": ("llama",)}
READS_TIMES = {"model_name": ("hstu",), "time_tokens": ("tokens", "embedding")}


def setting(default: Any, fixed: str, *needs: dict[str, tuple]) -> Any:
    """A field with its default and the PARTS that fix it. Another value than the default has an effect only
    where, for each of `needs`, one of the settings named has one of the values listed."""
    return field(default=default, metadata={"fixed": fixed.split(), "needs": needs})


@dataclass
class ModelConfig:
    """Model"""

    task: str = setting("matching", "model")
    """matching = rank the whole catalogue by what comes next; ctr = how likely is it that the user likes an
    item shown (reclm/data/impressions.py)"""
    model_name: str = setting("llama", "model")
    """kind of block: llama (LLaMA2, model.py) or hstu (reclm/nn/hstu.py)"""
    max_len: int = setting(200, "model")
    """T: a user's history is cut to the last max_len actions"""
    dim: int = setting(64, "model")
    """D: model width"""
    n_layers: int = setting(2, "model")
    """number of blocks"""
    n_heads: int = setting(2, "model")
    """H: query heads"""
    n_kv_heads: int = setting(0, "model", LLAMA)
    """G: key-value heads of grouped-query attention; 0 = as many as n_heads"""
    hidden_dim: int = setting(0, "model", LLAMA)
    """F: feed-forward width; 0 = 8/3 dim, rounded up to a multiple of 32"""
    window: int = setting(0, "model")
    """W: attend to the last `window` positions only; 0 = to all"""
    position_embedding: bool = setting(False, "model")
    """add an embedding of the number of earlier actions to each item's (reclm/nn/layers.py)"""
    profile_tokens: bool = setting(False, "model")
    """begin each row with tokens of the user's profile: gender, age, ... (reclm/nn/inputs.py)"""
    time_tokens: Literal["none", "tokens", "embedding"] = setting("none", "model")
    """the time since the action before: a token of its own, with hour and weekday where a session begins, or
    an embedding added to the item's (reclm/nn/inputs.py)"""
    action_embedding: bool | None = setting(None, "model")
    """add an embedding of the rating given to each item's [default: true with task=ctr]"""
    item_features: str | None = setting(None, "model")
    """item content besides ids: a comma-separated list of genres, year, title (of the item table) and paths
    of .npy or .safetensors files with one row per item"""
    id_dropout: float = setting(0.0, "model")
    """share of the items that go without their id in a training step: content learns to stand alone"""
    time_head: bool = setting(False, "model", MATCHING)
    """learn the distribution of the time to the next action as well (reclm/nn/heads.py)"""
    request_time: bool = setting(False, "model", MATCHING, READS_TIMES)
    """the model knows WHEN the item to predict was chosen, through hstu's bias and time_tokens; such numbers
    compare only with others that know it"""
    gated_residuals: bool = setting(False, "model", LLAMA)
    """llama: a learned gate on each residual branch (LiGR, arXiv 2502.03417)"""
    dropout: float = setting(0.2, "model")
    """on the embedding and on the residual branches"""
    user_embedding: Literal["none", "explicit"] = setting("none", "model")
    """explicit = add a learned vector per user (SASRec, section III.E)"""
    dtype: Literal["float32", "bfloat16"] = setting("float32", "trajectory")
    """of the blocks; embeddings, loss and ranking stay in float32"""

    def __post_init__(self):
        is_ctr = self.task == "ctr"
        if self.action_embedding is None:
            self.action_embedding = is_ctr
        positive(self, "max_len", "dim", "n_layers", "n_heads")
        not_negative(self, "n_kv_heads", "hidden_dim", "window")
        probability(self, "dropout")
        probability(self, "id_dropout")
        if self.id_dropout and not self.item_features:
            raise UserError(f"--id_dropout={self.id_dropout} needs --item_features: leave it out")
        if is_ctr and self.time_tokens == "tokens":
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
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return self.hidden_dim or 32 * math.ceil(self.dim * 8 / 3 / 32)


@dataclass
class DataConfig:
    """Data"""

    dataset: str | None = setting(None, "data")
    """ml-1m, ml-1m-sasrec, ml-1m-m1, ml-100k, movielens-latest-x1 (ctr), or a path to a .csv or .parquet
    file with the columns user,item[,rating][,timestamp][,label][,context][,split]; not given: MovieLens-1M,
    or where it cannot be had MovieLens-100K"""
    data_dir: str | None = setting(None, "free")
    """where data files are looked for and downloaded to [default: $RECLM_DATA, else data/]"""
    min_item_count: int = setting(1, "data leak", MATCHING)
    """drop items with fewer interactions (5 on ml-1m gives the sequences of ml-1m-sasrec)"""
    shuffle_ties: int = setting(0, "data leak")
    """seed: actions of the same user and second in a random order; 0 = in the order of the file"""
    cold_items: float = setting(0.0, "data leak", MATCHING, {"exclude_history": (True,)})
    """share of the items to keep out of training and to be the test items, for a cold-start evaluation"""
    ctr_split: Literal["time", "random", "own"] | None = setting(None, "data leak")
    """how impressions are split 8:1:1: by the span of time, at random, or by the column split [default with
    task=ctr: own if that column exists, else time]; with task=matching: train on the training part only, for
    init_from"""
    ctr_history: Literal["past", "train"] | None = setting(None, "trajectory", CTR)
    """ctr: the history of an impression is all that its user did before it, or the training part of that
    [default: past with ctr_split=time, else train]"""
    ctr_delay: float | None = setting(None, "trajectory", CTR)
    """ctr: seconds between an impression and the latest action in its history; 0 = also earlier rows of the
    same second, as published sequence models have it [default: 1, or 0 without timestamps]"""
    positive_from: float = setting(4.0, "data leak", IMPRESSIONS)
    """ctr: a rating of this or more is positive (a column label overrides it)"""
    drop_rating: float | None = setting(None, "data leak", IMPRESSIONS)
    """ctr: drop the rows with this rating"""
    min_positives: int = setting(0, "data leak", IMPRESSIONS)
    """ctr: drop users and items with fewer positives, until all have them"""
    utc_offset: float = setting(0.0, "data leak", IMPRESSIONS)
    """hours that the days of ctr_split=time are ahead of UTC"""

    def __post_init__(self):
        positive(self, "min_item_count")
        not_negative(self, "shuffle_ties", "min_positives")
        for name in ("positive_from", "drop_rating", "utc_offset"):
            finite(self, name)
        if self.ctr_delay is not None:
            not_negative(self, "ctr_delay")
        probability(self, "cold_items")

    @property
    def folder(self) -> str:
        return self.data_dir or os.environ.get("RECLM_DATA") or "data"


@dataclass
class LossConfig:
    """Loss"""

    loss: str = setting("bce", "trajectory", MATCHING)
    """bce, gbce, sampled_softmax or softmax: binary cross entropy (SASRec), generalised BCE (gSASRec),
    softmax over negatives or over all items (reclm/nn/losses.py)"""
    num_negatives: int = setting(1024, "trajectory", MATCHING, {"loss": AnyBut(["softmax"])})
    """N: negatives that each target is compared with (softmax uses all items instead)"""
    share_negatives: bool = setting(True, "trajectory", MATCHING, {"loss": AnyBut(["softmax"])})
    """true = one draw for the whole batch (fast); false = one draw per position (SASRec)"""
    exclude_history: bool = setting(True, "trajectory", MATCHING)
    """no item of the user's training history counts as a negative, as none is ranked either; false = only
    the target is excluded"""
    negative_below: float | None = setting(None, "trajectory", MATCHING)
    """actions with a lower rating are negative feedback: in the history, but never a target of the loss"""

    def __post_init__(self):
        positive(self, "num_negatives")
        finite(self, "negative_below")


@dataclass
class TrainConfig:
    """Training"""

    num_epochs: int = setting(20, "trajectory")
    """epochs 0 .. num_epochs - 1"""
    batch_size: int = setting(32, "trajectory")
    """sequences per optimizer step, over ALL processes: a recipe means the same on any number of them"""
    optimizer: str = setting("adamw", "trajectory")
    """adamw (reclm/run/optim.py)"""
    lr: float = setting(3e-3, "trajectory")
    """peak learning rate"""
    weight_decay: float = setting(0.01, "trajectory")
    """on the matrices of the blocks; norms have none"""
    embedding_decay: float = setting(0.0, "trajectory")
    """weight decay on the embeddings"""
    warmup_steps: int = setting(100, "trajectory")
    """steps of linear warm-up"""
    lr_min: float = setting(0.1, "trajectory")
    """after the warm-up a cosine brings the learning rate down to this fraction of lr; 1 = constant"""
    clip_norm: float = setting(1.0, "trajectory")
    """largest norm of the gradient; 0 = no clipping"""
    grad_accum_steps: int = setting(1, "free")
    """cut each batch into this many passes to save memory; the result is the same"""
    patience: int = setting(0, "free")
    """stop after this many epochs without a better validation; 0 = never"""
    seed: int = setting(0, "trajectory")
    """of initial weights, order, dropout and negatives"""
    init_from: str | None = setting(None, "free")
    """start from the weights of this checkpoint that this model has as well: matching can start ctr"""
    compile: bool = setting(False, "free")
    """torch.compile the blocks (first steps take a minute)"""
    ema: float = setting(0.0, "trajectory")
    """evaluate an exponential moving average of the weights, with this decay per step; 0 = the weights"""
    keep_last: int = setting(20, "free")
    """keep the newest epoch_N.pth files (best.pth and last.pth are always kept); 0 = all"""

    def __post_init__(self):
        positive(self, "num_epochs", "batch_size", "lr", "grad_accum_steps")
        not_negative(self, "weight_decay", "embedding_decay", "warmup_steps", "clip_norm")
        not_negative(self, "patience", "seed", "keep_last")
        probability(self, "lr_min", closed=True)
        probability(self, "ema")
        if self.seed >= 2**32:
            raise UserError(f"--seed={self.seed} must be below 2**32")


@dataclass
class EvalConfig:
    """Evaluation"""

    filter_seen: bool = setting(True, "free", MATCHING)
    """leave items of the user's history out of the ranking"""


@dataclass
class RunConfig:
    """Run: not part of a checkpoint"""

    eval_only: bool = setting(False, "free")
    """true = evaluate a checkpoint instead of training"""
    ckpt_name: str = setting("best.pth", "free")
    """the checkpoint that eval_only reads, a file in out_dir or a path; --keep_last spares it"""
    out_dir: str | None = setting(None, "free")
    """where results go [default: a new runs/<time>-<dataset>-<model>; eval_only, resume: runs/latest]"""
    resume: str | None = setting(None, "free")
    """auto = go on from last.pth in out_dir, or start where there is none; or a path to a checkpoint"""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "free")
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


SECTIONS = {section.name: section.type for section in fields(Config)}
FIELDS = {f.name: f for section in SECTIONS.values() for f in fields(section)}


def fixed_names(values: dict, *parts: str) -> list[str]:
    """The settings that these PARTS of a checkpoint fix; `values` are its own. The number of epochs is part
    of the trajectory unless the learning rate is constant: the cosine ends with the last of them."""
    names = [name for name, f in FIELDS.items() if not set(parts).isdisjoint(f.metadata["fixed"])]
    if values.get("lr_min") == 1:
        names = [name for name in names if name != "num_epochs"]
    return names


def build_config(values: dict) -> Config:
    """Config from {name: value}; what is missing keeps its default. Raises UserError."""
    cfg = Config(
        **{
            section: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
            for section, cls in SECTIONS.items()
        }
    )
    flat = cfg.flat()
    for name in flat:
        refuse_without_effect(name, flat)
    if cfg.data.cold_items and not cfg.loss.share_negatives:
        raise UserError("--cold_items keeps items out of the loss, --share_negatives=false cannot: drop one")
    if cfg.loss.exclude_history and not cfg.eval.filter_seen:
        raise UserError(
            "--filter_seen=false ranks the items of the history, but the loss leaves them out: "
            "train with --exclude_history=false"
        )
    return cfg


def refuse_without_effect(name: str, flat: dict) -> None:
    if flat[name] == FIELDS[name].default:
        return
    for others in FIELDS[name].metadata["needs"]:
        if not any(flat[other] in useful for other, useful in others.items()):
            with_others = " ".join(f"--{other}={flat[other]}" for other in others)
            raise UserError(f"--{name}={flat[name]} has no effect with {with_others}: leave it out")


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
