"""Settings that contradict each other. Each function takes a Config of reclm/config.py and raises UserError
for those of one feature, naming one to change."""

from reclm.errors import UserError
from reclm.settings import IMPRESSIONS

IN_BACKWARD = ("lomo", "adalomo")  # optimizers that update weights within the backward pass
# Those whose state can be gathered from parts of weights.
ALONGSIDE = {"torch": ("adamw", "muon"), "deepspeed": ("adamw",)}  # by engine


def refuse_contradictions(cfg) -> None:
    if cfg.model.window >= cfg.model.max_len:
        raise UserError(
            f"--window={cfg.model.window} has no effect with --max_len={cfg.model.max_len}: leave it out"
        )
    of_a_start(cfg)
    of_the_item_table(cfg)
    of_quantization(cfg)
    of_the_optimizer(cfg)
    of_the_processes(cfg)
    of_the_protocol(cfg)


def of_a_start(cfg) -> None:
    if cfg.train.init_from == "":
        raise UserError("--init_from= names no checkpoint: leave it out")
    needing = {
        "adapter": cfg.adapt.adapter != "none" and cfg.adapt.adapter,
        "train_only": cfg.adapt.train_only != "all" and cfg.adapt.train_only,
        "init_match": cfg.train.init_match != "id" and cfg.train.init_match,
    }
    for name, value in needing.items():
        if value and not cfg.train.init_from:
            raise UserError(f"--{name}={value} needs --init_from=BASE.pth, the model to start from")
    if cfg.adapt.adapter != "none" and cfg.model.user_embedding == "explicit":
        raise UserError("--user_embedding=explicit has a vector per user, which no adapter holds: drop one")
    if cfg.run.from_hub and not cfg.run.eval_only:
        raise UserError("--from_hub is for --eval_only=true: a model of the hub cannot be trained on")


def of_the_item_table(cfg) -> None:
    if cfg.model.item_table == "dense":
        return
    dim, codes, centroids = cfg.model.dim, cfg.model.pq_codes, cfg.model.pq_centroids
    if codes < 1 or dim % codes:
        raise UserError(f"--pq_codes={codes} must divide --dim={dim}")
    if centroids != 0 and not 2 <= centroids <= 256:
        raise UserError(f"--pq_centroids={centroids} must be 2 to 256, or 0 for the default")
    others = {
        "item_features": cfg.model.item_features,
        "cold_items": cfg.data.cold_items,
        "init_match": cfg.train.init_match == "none" and cfg.train.init_match,
        "adapter": cfg.adapt.adapter != "none" and cfg.adapt.adapter,
        "qat": cfg.train.qat != "none" and cfg.train.qat,
        "optimizer": cfg.train.optimizer == "sophia" and cfg.train.optimizer,
    }
    for name, value in others.items():
        if value:
            raise UserError(f"--{name}={value} needs --item_table=dense, a vector per item: leave one out")


def of_quantization(cfg) -> None:
    if cfg.run.quantize != "none" and not cfg.run.eval_only:
        raise UserError(f"--quantize={cfg.run.quantize} is for --eval_only=true: to train for it use --qat")
    others = {
        "item_features": cfg.model.item_features,
        "compile": cfg.train.compile,
        "adapter": cfg.adapt.adapter != "none" and cfg.adapt.adapter,
    }
    for name, value in others.items():
        if cfg.train.qat != "none" and value:
            raise UserError(f"--qat={cfg.train.qat} does not go with --{name}={value}: leave one out")


def of_the_optimizer(cfg) -> None:
    if cfg.train.optimizer in IN_BACKWARD and cfg.train.grad_accum_steps > 1:
        raise UserError(
            f"--optimizer={cfg.train.optimizer} updates the weights in each backward pass: "
            "leave out --grad_accum_steps"
        )
    if cfg.train.optimizer == "sophia" and (cfg.loss.loss != "softmax" or cfg.model.time_head):
        raise UserError(
            "--optimizer=sophia draws targets from the softmax over all items: "
            "use --loss=softmax without --time_head, or another optimizer"
        )


def of_the_processes(cfg) -> None:
    ours, train = cfg.processes, cfg.train
    if ours.tp_size and "tp" not in ours.parallel:
        raise UserError(
            f"--tp_size={ours.tp_size} has no effect with --parallel={ours.parallel}: leave it out"
        )
    for name, default in (("zero_stage", 2), ("deepspeed_config", None)):
        value = getattr(ours, name)
        if ours.engine == "torch" and value != default:
            raise UserError(f"--{name}={value} has no effect with --engine=torch: leave it out")
    chosen = f"--parallel={ours.parallel}" * (ours.parallel != "ddp") or "--deal_items" * ours.deal_items
    chosen = "--engine=deepspeed" if ours.engine == "deepspeed" else chosen
    if not chosen:
        return
    if ours.engine == "deepspeed" and (ours.parallel != "ddp" or ours.deal_items):
        raise UserError(
            "--engine=deepspeed lays out the weights itself: leave out --parallel and --deal_items"
        )
    others = {
        "item_table": cfg.model.item_table != "dense" and cfg.model.item_table,
        "adapter": cfg.adapt.adapter != "none" and cfg.adapt.adapter,
        "qat": train.qat != "none" and train.qat,
        "optimizer": train.optimizer not in ALONGSIDE[ours.engine] and train.optimizer,
        "item_features": ours.deal_items and cfg.model.item_features,
        "table_optimizer": ours.engine == "deepspeed"
        and train.table_optimizer != "same"
        and train.table_optimizer,
        "ema": ours.engine == "deepspeed" and ours.zero_stage == 3 and train.ema,
        "compile": ours.engine == "deepspeed" and train.compile,
        "init_from": ours.deal_items and train.init_from,
        "quantize": ours.deal_items and cfg.run.quantize != "none" and cfg.run.quantize,
    }
    for name, value in others.items():
        if value:
            raise UserError(f"{chosen} does not go with --{name}={value}: leave one out, or use another")


def of_the_protocol(cfg) -> None:
    if cfg.data.cold_items and not cfg.loss.share_negatives:
        raise UserError("--cold_items needs --share_negatives=true, to keep cold items out of the negatives")
    flat = cfg.flat()
    if flat["repeats"] in ("first", "last") and any(flat[name] in used for name, used in IMPRESSIONS.items()):
        raise UserError(
            f"--repeats={flat['repeats']} is for --task=matching without --ctr_split: leave it out"
        )
    if cfg.loss.exclude_history and not cfg.eval.filter_seen:
        raise UserError(
            "--filter_seen=false ranks the items of the history, which are no negatives in training: "
            "train with --exclude_history=false"
        )
