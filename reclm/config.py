"""All settings, as one dataclass per section. reclm/flags.py fills them from YAML files and flags.

Names are unique across sections, so flags and YAML keys need no prefix: `--lr=5e-4 --n_layers=4`.
The string under each field is its help text (`python main.py --help`).
"""

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Literal

from reclm.contradictions import refuse_contradictions
from reclm.errors import UserError
from reclm.processes import ProcessConfig
from reclm.settings import (
    ADAPTED,
    CTR,
    FULL_GRADIENT,
    IMPRESSIONS,
    LLAMA,
    MATCHING,
    PQ,
    READS_TIMES,
    AnyBut,
    finite,
    not_negative,
    positive,
    probability,
    setting,
)

# Learning rates without --lr; those of the other optimizers: 3e-3
USUAL_LR = {"adafactor": 0.2, "muon": 0.02, "sophia": 3e-4, "lomo": 1.0, "adalomo": 0.2}


@dataclass
class ModelConfig:
    """Model"""

    task: str = setting("matching", "model")
    """matching = rank all items as the user's next one; ctr = predict the probability that a user responds
    positively to an item shown"""
    model_name: str = setting("llama", "model")
    """block type: llama (LLaMA2, model.py) or hstu (reclm/nn/hstu.py)"""
    max_len: int = setting(200, "model")
    """T, sequence length: the model sees a user's last max_len actions"""
    dim: int = setting(64, "model")
    """D, model width"""
    n_layers: int = setting(2, "model")
    """number of blocks"""
    n_heads: int = setting(2, "model")
    """H, number of attention heads (query heads); must divide dim"""
    n_kv_heads: int = setting(0, "model", LLAMA)
    """G, key-value heads of grouped-query attention in llama blocks; 0 = n_heads"""
    hidden_dim: int = setting(0, "model", LLAMA)
    """F, feed-forward width of llama blocks; 0 = 8/3 dim, rounded up to a multiple of 32"""
    window: int = setting(0, "model")
    """W, attention window: attend to the last `window` positions, the current one included; 0 = to all"""
    position_embedding: bool = setting(False, "model")
    """add to each item an embedding of the number of the user's earlier actions, on a log scale"""
    profile_tokens: bool = setting(False, "model")
    """start each sequence with one token per field of the user table (gender, age, ...)"""
    time_tokens: Literal["none", "tokens", "embedding"] = setting("none", "model")
    """time since the previous action as input: tokens = one token before each action, plus weekday and hour
    (UTC) when a session starts, after an hour without actions; embedding = a vector added to each item"""
    action_embedding: bool | None = setting(None, "model")
    """add to each item of the history an embedding of its rating (with task=ctr and no ratings, of its
    label) [default: true with task=ctr, else false]"""
    item_features: str | None = setting(None, "model")
    """item content to add to the item embeddings: a comma-separated list of genres, year, title (from the
    item table) and of .npy or .safetensors files with one row per item [default: none]"""
    id_dropout: float = setting(0.0, "model")
    """share of items whose id embedding is zeroed in a training step: cold items need item_features alone"""
    time_head: bool = setting(False, "model", MATCHING)
    """also train and evaluate a prediction of the time to the next action (reclm/nn/heads.py)"""
    request_time: bool = setting(False, "model", MATCHING, READS_TIMES)
    """give the model the time of the item to predict, through the time bias of hstu and time_tokens; compare
    such results only with models that also know it"""
    gated_residuals: bool = setting(False, "model", LLAMA)
    """multiply each residual branch of llama blocks by a trained sigmoid gate (LiGR, arXiv 2502.03417)"""
    item_table: Literal["dense", "pq"] = setting("dense", "model", MATCHING)
    """dense = a trained vector per item; pq = item vectors put together from shared, trained sub-vectors, for
    large catalogues (RecJPQ, arXiv 2312.06165; docs/pq.md)"""
    pq_codes: int = setting(8, "model", PQ)
    """m, sub-vectors per item with item_table=pq, one byte each; must divide dim"""
    pq_centroids: int = setting(0, "model", PQ)
    """k, sub-vectors to choose each of them from, at most 256; 0 = 256, fewer with less than 4,096 items"""
    dropout: float = setting(0.2, "model")
    """dropout probability, on the input embeddings and on each residual branch"""
    user_embedding: Literal["none", "explicit"] = setting("none", "model")
    """explicit = add a trained vector per user to the output (SASRec, arXiv 1808.09781, section III.E)"""
    dtype: Literal["float32", "bfloat16"] = setting("float32", "trajectory")
    """precision of the blocks (by autocast); weights, embeddings, loss and scores are always float32"""

    def __post_init__(self):
        is_ctr = self.task == "ctr"
        if self.action_embedding is None:
            self.action_embedding = is_ctr
        positive(self, "max_len", "dim", "n_layers", "n_heads")
        not_negative(self, "n_kv_heads", "hidden_dim", "window")
        probability(self, "dropout", "id_dropout")
        if self.id_dropout and not self.item_features:
            raise UserError(f"--id_dropout={self.id_dropout} needs --item_features: add them or leave it out")
        if is_ctr and self.time_tokens == "tokens":
            raise UserError("--time_tokens=tokens is for --task=matching: use --time_tokens=embedding")
        if self.time_head and self.request_time:
            raise UserError("--request_time=true reveals the time that --time_head=true predicts: drop one")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            heads = f"--n_heads={self.n_heads} heads of even width"
            raise UserError(f"--dim={self.dim} must be a multiple of {2 * self.n_heads} for {heads}")
        if self.n_heads % self.kv_heads:
            raise UserError(f"--n_heads={self.n_heads} must be a multiple of --n_kv_heads={self.n_kv_heads}")

    @property
    def kv_heads(self) -> int:  # G
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:  # Dh
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:  # F
        return self.hidden_dim or 32 * math.ceil(self.dim * 8 / 3 / 32)


@dataclass
class DataConfig:
    """Data"""

    dataset: str | None = setting(None, "data")
    """ml-1m, ml-1m-sasrec, ml-1m-m1, ml-100k, movielens-latest-x1 (for task=ctr), or your own files: CSV,
    JSON lines, Parquet (docs/data.md) [default: ml-1m, or ml-100k if that cannot be downloaded]"""
    columns: str | None = setting(None, "free")
    """own data: which column holds what, e.g. user=visitor,item=sku, or without a header user=1,item=3"""
    drop_bad_rows: bool = setting(False, "data")
    """own data: drop and count rows with a missing id, a malformed value or another number of fields; false =
    refuse the file, naming the first of them"""
    positive_label: str | None = setting(None, "data leak")
    """own data: the value of the column label that means 1, all others 0 [default: labels are 0 or 1]"""
    data_dir: str | None = setting(None, "free")
    """folder to read data files from and to download them to [default: $RECLM_DATA, else data/]"""
    min_item_count: int = setting(1, "data leak", MATCHING)
    """drop items with fewer interactions; 1 = keep all (5 on ml-1m gives the sequences of ml-1m-sasrec)"""
    repeats: Literal["keep", "first", "last"] | None = setting(None, "data leak")
    """keep = keep all rows; first, last = keep a user's first or last action on each item (task=matching)
    [default: drop rows of your own file that equal an earlier one in all columns, if one is the timestamp]"""
    shuffle_ties: int = setting(0, "data leak")
    """seed for a random order of a user's actions within the same second; 0 = keep the order of the file"""
    cold_items: float = setting(0.0, "data leak", MATCHING, {"exclude_history": (True, None)})
    """for a cold-start evaluation, hold this share of the items out of training and test on them; 0 = none"""
    ctr_split: Literal["time", "random", "own"] | None = setting(None, "data leak")
    """how impressions are split: time = by date, at 80 and 90 percent of the time span; random = 8:1:1; own =
    by the column split [default with task=ctr: own if that column exists, else time]. With task=matching:
    train on the training part of this split only, for --task=ctr --init_from [default: use all data]"""
    ctr_history: Literal["past", "train"] | None = setting(None, "trajectory", CTR)
    """task=ctr: the history of an impression holds all of the user's earlier actions (past) or those in the
    training part (train) [default: past with ctr_split=time, else train]"""
    ctr_delay: float | None = setting(None, "trajectory", CTR)
    """task=ctr: least number of seconds between an action in the history and the impression; 0 = also include
    earlier rows of the same second, as published models do [default: 1, or 0 without timestamps]"""
    positive_from: float = setting(4.0, "data leak", IMPRESSIONS)
    """task=ctr: ratings of this value or more are positive; ignored if the data have a column label"""
    drop_rating: float | None = setting(None, "data leak", IMPRESSIONS)
    """task=ctr: drop impressions with this rating, e.g. a neutral one [default: keep all]"""
    min_positives: int = setting(0, "data leak", IMPRESSIONS)
    """task=ctr: drop users and items with fewer positives, until all that remain have them; 0 = keep all"""
    utc_offset: float = setting(0.0, "data leak", IMPRESSIONS)
    """task=ctr: time zone in which ctr_split=time counts days, in hours ahead of UTC"""

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
    """bce = binary cross entropy (SASRec), gbce = generalised BCE (gSASRec), sampled_softmax or softmax =
    cross entropy over sampled negatives or over all items (reclm/nn/losses.py)"""
    num_negatives: int = setting(1024, "trajectory", MATCHING, {"loss": AnyBut(["softmax"])})
    """N, negatives per target, drawn uniformly (loss=softmax compares with all items instead)"""
    share_negatives: bool = setting(True, "trajectory", MATCHING, {"loss": AnyBut(["softmax"])})
    """true = draw negatives once per batch, which is fast; false = once per position, as SASRec does"""
    exclude_history: bool | None = setting(None, "trajectory", MATCHING)
    """true = items of the user's training history are not used as negatives, since filter_seen keeps them out
    of the ranking as well; false = only the target is not used [default: as for filter_seen]"""
    negative_below: float | None = setting(None, "trajectory", MATCHING)
    """treat lower ratings as negative feedback, which stays in the history but is never a target of the loss
    [default: every action is a target]"""

    def __post_init__(self):
        positive(self, "num_negatives")
        finite(self, "negative_below")


@dataclass
class TrainConfig:
    """Training"""

    num_epochs: int = setting(20, "trajectory")
    """number of passes over the training data"""
    batch_size: int = setting(32, "trajectory")
    """sequences per optimizer step, over ALL processes, so that any number of them takes the same steps"""
    optimizer: str = setting("muon", "trajectory")
    """muon, adamw, adamw8bit, adafactor, sophia, lomo or adalomo (docs/optimizers.md)"""
    lr: float | None = setting(None, "trajectory")
    """learning rate, before it is scaled by the warm-up and by the cosine of lr_min [default: by optimizer,
    muon .02, adamw .003]"""
    table_optimizer: Literal["same", "rowwise_adagrad"] = setting("same", "trajectory", FULL_GRADIENT)
    """rowwise_adagrad = train the embeddings by Adagrad with one number of state per row"""
    table_lr: float = setting(0.2, "trajectory", {"table_optimizer": ("rowwise_adagrad",)})
    """learning rate of table_optimizer=rowwise_adagrad"""
    weight_decay: float = setting(0.01, "trajectory")
    """weight decay of all matrices but embeddings; norm gains and biases have none"""
    embedding_decay: float = setting(0.0, "trajectory")
    """weight decay of the embeddings"""
    warmup_steps: int | None = setting(None, "trajectory")
    """optimizer steps of linearly rising learning rate [default: 100, at most a tenth of the run's steps]"""
    lr_min: float = setting(0.1, "trajectory")
    """the learning rate falls along a cosine, over the whole run, to this fraction of lr; 1 = constant"""
    clip_norm: float = setting(1.0, "trajectory", {"optimizer": AnyBut(["adalomo"])})
    """clip the gradient to this L2 norm, for which lomo takes a second pass per step; 0 = no clipping"""
    grad_accum_steps: int = setting(1, "free")
    """cut each batch into this many micro-batches to save memory; an optimizer step still uses all of them"""
    patience: int = setting(0, "free")
    """stop after this many epochs without a better validation score; 0 = never"""
    seed: int = setting(0, "trajectory")
    """random seed of initial weights, batches, dropout and negatives"""
    init_from: str | None = setting(None, "free")
    """checkpoint whose weights a new run starts from, where name and shape agree [default: random weights]"""
    init_match: Literal["id", "title", "none"] = setting("id", "free")
    """how items of --init_from are found in these data: by id; by title and year, or none, where these data
    have other users and ids"""
    compile: bool = setting(False, "free")
    """speed up the blocks with torch.compile; compiling takes about a minute in the first steps"""
    ema: float = setting(0.0, "trajectory")
    """evaluate and save an exponential moving average of the weights with this decay per step; 0 = off"""
    qat: Literal["none", "int8", "int4"] = setting("none", "trajectory")
    """train for --quantize of the same value: the forward pass rounds the weights as it does"""
    save_every: int = setting(0, "free")
    """optimizer steps after which last.pth is written in the background, besides each epoch; 0 = never"""
    keep_last: int = setting(20, "free")
    """number of newest epoch_N.pth files to keep; 0 = all (best.pth and last.pth are always kept)"""

    def __post_init__(self):
        if self.lr is None:
            self.lr = USUAL_LR.get(self.optimizer, 3e-3)
        positive(self, "num_epochs", "batch_size", "lr", "table_lr", "grad_accum_steps")
        not_negative(self, "weight_decay", "embedding_decay", "clip_norm", "patience", "seed")
        not_negative(self, "keep_last", "save_every")
        if self.warmup_steps is not None:
            not_negative(self, "warmup_steps")
        probability(self, "lr_min", closed=True)
        probability(self, "ema")
        if self.seed >= 2**32:
            raise UserError(f"--seed={self.seed} must be less than 2**32")


@dataclass
class AdaptConfig:
    """Adaptation of a trained model (docs/adapt.md)"""

    adapter: Literal["none", "lora", "dora"] = setting("none", "model")
    """freeze the weights of --init_from and train low-rank updates of them: lora (arXiv 2106.09685), or dora,
    which also trains the length of each row (arXiv 2402.09353)"""
    adapter_rank: int = setting(8, "model", ADAPTED)
    """r, rank of the updates"""
    adapter_targets: str | None = setting(None, "model", ADAPTED)
    """what is updated, separated by commas: layers of the blocks such as wq,wv, and table for the item table
    [default: all layers of the blocks whose names start with w]"""
    train_only: Literal["all", "blocks", "table"] = setting("all", "trajectory", {"adapter": ("none",)})
    """of the weights of --init_from train only those of the blocks, or only the item table; weights that it
    lacks are always trained"""

    def __post_init__(self):
        positive(self, "adapter_rank")


@dataclass
class EvalConfig:
    """Evaluation"""

    filter_seen: bool | None = setting(None, "free", MATCHING)
    """true = leave the items of the user's history out of the ranking; false = rank them too, which needs a
    model trained with --exclude_history=false [default: true, unless 1 % of the validation or test items are
    ones that the user has used before]"""


@dataclass
class RunConfig:
    """Run (not stored in checkpoints)"""

    eval_only: bool = setting(False, "free")
    """evaluate a checkpoint instead of training"""
    describe: bool = setting(False, "free")
    """print what was understood of the data and what a run would take, and end"""
    ckpt_name: str = setting("best.pth", "free")
    """checkpoint to evaluate with --eval_only, a file name in out_dir or a path; in training, a file of this
    name that --keep_last does not delete"""
    quantize: Literal["none", "int8", "int4"] = setting("none", "free")
    """with --eval_only, store the item table and the weights of the blocks as integers of 8 or 4 bits"""
    from_hub: str | None = setting(None, "free")
    """model of the Hugging Face hub to evaluate with --eval_only, owner/name (docs/hub.md)"""
    out_dir: str | None = setting(None, "free")
    """folder of the run [default: a new runs/<time>-<dataset>-<model>; with eval_only or resume=auto
    runs/latest, with the path of a checkpoint its folder]"""
    resume: str | None = setting(None, "free")
    """auto = continue from last.pth in out_dir, or start a new run if there is none; or a path to a
    checkpoint to continue from [default: start a new run]"""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "free")
    """auto = cuda if a GPU is available, else cpu"""


@dataclass
class Config:
    """The settings of a run, one attribute per section. Build it with `build_config`, which validates."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    train: TrainConfig
    adapt: AdaptConfig
    eval: EvalConfig
    run: RunConfig
    processes: ProcessConfig

    def flat(self) -> dict:
        """{name: value} of all settings that a checkpoint stores: every section but the last two."""
        parts = asdict(self)
        del parts["run"], parts["processes"]
        return {name: value for part in parts.values() for name, value in part.items()}


SECTIONS = {section.name: section.type for section in fields(Config)}
FIELDS = {f.name: f for section in SECTIONS.values() for f in fields(section)}


def fixed_names(values: dict, *parts: str) -> list[str]:
    """Names of the settings that these PARTS fix, given the settings `values` of the checkpoint. num_epochs
    is fixed with the trajectory, since the cosine ends with the last epoch, unless the rate is constant."""
    names = [name for name, f in FIELDS.items() if not set(parts).isdisjoint(f.metadata["fixed"])]
    if values.get("lr_min") == 1:
        names = [name for name in names if name != "num_epochs"]
    return names


def build_config(values: dict) -> Config:
    """The Config of {name: value}; missing settings get their defaults. Raises UserError for a value out of
    range, for one that has no effect with the others, and for settings that contradict each other."""
    cfg = Config(
        **{
            section: cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
            for section, cls in SECTIONS.items()
        }
    )
    flat = cfg.flat()
    for name, value in flat.items():
        if isinstance(value, int) and value > 2**32:
            raise UserError(f"--{name}={value} is too large: it must be at most {2**32:,}")
        refuse_without_effect(name, flat)
    settle_by_settings(cfg)
    refuse_contradictions(cfg)
    return cfg


def settle_by_settings(cfg: Config) -> None:
    """Decide on exclude_history and filter_seen where other settings leave no choice; for the rest, the data
    decide (reclm/data/repeats.py)."""
    if cfg.loss.exclude_history is None and (cfg.data.cold_items or cfg.eval.filter_seen is False):
        cfg.loss.exclude_history = bool(cfg.data.cold_items)
    if cfg.loss.exclude_history and cfg.eval.filter_seen is None:
        cfg.eval.filter_seen = True


def refuse_without_effect(name: str, flat: dict) -> None:
    """Raise UserError if the setting differs from its default where that changes nothing."""
    default = FIELDS[name].default
    if flat[name] == default:
        return
    if default is None and flat[name] is True:
        return  # as settle_history leaves it in checkpoints of --task=ctr
    for others in FIELDS[name].metadata["needs"]:
        if not any(flat[other] in useful for other, useful in others.items()):
            with_others = " ".join(f"--{other}={flat[other]}" for other in others)
            raise UserError(f"--{name}={flat[name]} has no effect with {with_others}: leave it out")
