"""The settings: refused values and combinations, what fixes each setting, and that each is used."""

import ast
import dataclasses
import typing
from math import inf, nan
from pathlib import Path

import pytest

from data import SEQUENCES
from evaluate import EVALUATE
from model import BLOCKS, FORWARD, SequenceRecommender
from reclm.config import (
    FIELDS,
    SECTIONS,
    Config,
    ModelConfig,
    TrainConfig,
    build_config,
    fixed_names,
)
from reclm.data.dataset import Vocabulary
from reclm.data.prepare import PREPARE
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.nn.losses import LOSSES
from reclm.run.folder import dump_config
from reclm.run.optim import OPTIMIZERS, build_optimizer
from reclm.run.report import REPORT
from reclm.settings import PARTS, AnyBut

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SOURCES = [ROOT / f"{name}.py" for name in ("main", "model", "data", "evaluate")]
SOURCES += sorted((ROOT / "reclm").rglob("*.py"))
KNOWN = {"task": FORWARD, "model_name": BLOCKS, "loss": LOSSES, "optimizer": OPTIMIZERS}


# ---------------------------------------------------------------- values


def refused(values):
    """The one line that refuses these settings."""
    with pytest.raises(UserError) as caught:
        build_config(values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


OUT_OF_RANGE = {
    "dim": [0, -8], "n_layers": [0], "max_len": [0], "n_heads": [0], "n_kv_heads": [-1], "hidden_dim": [-1],
    "window": [-1], "dropout": [1.0, -0.1], "id_dropout": [1.0], "min_item_count": [0], "num_negatives": [0],
    "negative_below": [nan], "cold_items": [1.0], "shuffle_ties": [-1], "min_positives": [-1],
    "positive_from": [inf], "drop_rating": [nan], "utc_offset": [nan], "num_epochs": [0], "batch_size": [0],
    "lr": [0.0, -1.0, nan, inf], "weight_decay": [-1.0], "embedding_decay": [-1.0], "lr_min": [2.0],
    "clip_norm": [-1.0], "ema": [1.0], "grad_accum_steps": [0], "patience": [-1], "seed": [-1, 2**32],
    "keep_last": [-1], "save_every": [-1], "warmup_steps": [-1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_values_out_of_range_are_refused(name, value):
    assert f"--{name}={value}" in refused({name: value})


def test_heads_must_divide_the_width():
    assert "--n_heads=3" in refused({"dim": 64, "n_heads": 3})
    assert "even" in refused({"dim": 6, "n_heads": 2})  # heads of width 3 have no pairs to rotate
    assert "--n_kv_heads=3" in refused({"dim": 64, "n_heads": 4, "n_kv_heads": 3})
    assert "--n_kv_heads=8" in refused({"dim": 64, "n_heads": 4, "n_kv_heads": 8})


def test_derived_widths():
    assert ModelConfig(dim=64).ffn_dim == 192  # 170.7, rounded up to a multiple of 32
    assert ModelConfig(dim=96).ffn_dim == 256  # exactly 8/3
    assert ModelConfig(dim=64, hidden_dim=50).ffn_dim == 50
    assert ModelConfig(n_heads=2).kv_heads == 2 and ModelConfig(n_heads=2, n_kv_heads=1).kv_heads == 1


@pytest.mark.parametrize("name", KNOWN)
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
    """Names are keys of tables, and are checked next to the table."""
    cfg = build_config({name: "nonsense"})
    assert build_config({}).flat()[name] in KNOWN[name]
    with pytest.raises(UserError) as caught:
        if name == "optimizer":
            build_optimizer(SequenceRecommender(ModelConfig(), cfg.loss, Vocabulary(5, 2)), cfg.train)
        else:
            SequenceRecommender(cfg.model, cfg.loss, Vocabulary(5, 2))
    assert str(caught.value) == f"--{name}=nonsense must be one of {', '.join(KNOWN[name])}"


def test_every_task_has_all_its_parts():
    assert PREPARE.keys() == SEQUENCES.keys() == FORWARD.keys() == EVALUATE.keys() == REPORT.keys()


# ---------------------------------------------------------------- combinations


IDLE = [  # a setting that has no effect with these others
    ({"num_negatives": 5}, {"loss": "softmax"}),
    ({"share_negatives": False}, {"loss": "softmax"}),
    ({"gated_residuals": True}, {"model_name": "hstu"}),
    ({"n_kv_heads": 1}, {"model_name": "hstu"}),
    ({"hidden_dim": 50}, {"model_name": "hstu"}),
    ({"pq_codes": 4}, {"item_table": "dense"}),
    ({"pq_centroids": 16}, {"item_table": "dense"}),
    ({"request_time": True}, {"model_name": "llama", "time_tokens": "none"}),
    ({"cold_items": 0.1}, {"exclude_history": False}),
    ({"ctr_history": "past"}, {"task": "matching"}),
    ({"ctr_delay": 60.0}, {"task": "matching"}),
    ({"positive_from": 3.0}, {"task": "matching", "ctr_split": None}),
    ({"drop_rating": 3.0}, {"task": "matching", "ctr_split": None}),
    ({"min_positives": 2}, {"task": "matching", "ctr_split": None}),
    ({"utc_offset": 8.0}, {"task": "matching", "ctr_split": None}),
    ({"time_head": True}, {"task": "ctr"}),
    ({"request_time": True}, {"task": "ctr"}),
    ({"min_item_count": 2}, {"task": "ctr"}),
    ({"cold_items": 0.1}, {"task": "ctr"}),
    ({"loss": "gbce"}, {"task": "ctr"}),
    ({"num_negatives": 5}, {"task": "ctr"}),
    ({"share_negatives": False}, {"task": "ctr"}),
    ({"exclude_history": False}, {"task": "ctr"}),
    ({"negative_below": 3.0}, {"task": "ctr"}),
    ({"filter_seen": False}, {"task": "ctr"}),
    ({"item_table": "pq"}, {"task": "ctr"}),
    ({"table_optimizer": "rowwise_adagrad"}, {"optimizer": "lomo"}),
    ({"table_lr": 0.5}, {"table_optimizer": "same"}),
    ({"clip_norm": 0.5}, {"optimizer": "adalomo"}),
    ({"adapter_rank": 4}, {"adapter": "none"}),
    ({"adapter_targets": "wq"}, {"adapter": "none"}),
    ({"train_only": "table"}, {"adapter": "lora"}),
]


@pytest.mark.parametrize(("idle", "others"), IDLE)
def test_a_switch_without_effect_is_refused(idle, others):
    (name, value), *_ = idle.items()
    with_others = " ".join(f"--{other}={value}" for other, value in others.items())
    assert refused(idle | others) == f"--{name}={value} has no effect with {with_others}: leave it out"


def test_every_need_is_tried():
    """Every `needs` of a setting is covered by the test above."""
    tried = {(*idle, *others) for idle, others in IDLE}
    assert tried == {(name, *need) for name, field in FIELDS.items() for need in field.metadata["needs"]}


@pytest.mark.parametrize("useful", [{"model_name": "hstu"}, {"time_tokens": "embedding"}])
def test_one_of_two_switches_gives_another_its_effect(useful):
    assert build_config({"request_time": True, **useful}).model.request_time


@pytest.mark.parametrize("useful", [{"task": "ctr"}, {"ctr_split": "random"}])
def test_rules_of_impressions_count_for_both_tasks(useful):
    assert build_config({"positive_from": 3.0, **useful}).data.positive_from == 3


def test_items_left_out_of_the_loss_cannot_be_ranked():
    message = refused({"filter_seen": False, "exclude_history": True})
    assert message.startswith("--filter_seen=false ") and "train with --exclude_history=false" in message
    cfg = build_config({"filter_seen": False, "exclude_history": False})
    assert not cfg.eval.filter_seen and not cfg.loss.exclude_history


HISTORY = [  # what is given -> exclude_history and filter_seen; None is for the data to decide
    ({}, None, None),
    ({"filter_seen": False}, False, False),
    ({"filter_seen": True}, None, True),
    ({"exclude_history": True}, True, True),
    ({"exclude_history": False}, False, None),
    ({"exclude_history": False, "filter_seen": True}, False, True),
    ({"cold_items": 0.1}, True, True),
]


@pytest.mark.parametrize(("given", "excluded", "filtered"), HISTORY)
def test_a_history_left_out_of_the_loss_is_left_out_of_the_ranking(given, excluded, filtered):
    cfg = build_config(given)
    assert (cfg.loss.exclude_history, cfg.eval.filter_seen) == (excluded, filtered)


def test_cold_items_leave_the_history_out():
    assert "--exclude_history=false" in refused({"cold_items": 0.1, "filter_seen": False})


def test_a_file_of_ctr_that_says_true_is_read():
    """As the data decide where nothing repeats, and as all files of earlier versions have it."""
    cfg = build_config({"task": "ctr", "exclude_history": True, "filter_seen": True})
    assert cfg.loss.exclude_history and cfg.eval.filter_seen
    assert "--drop_rating=1.0" in refused({"drop_rating": 1.0})  # 1 is not true


@pytest.mark.parametrize("impressions", [{"task": "ctr"}, {"ctr_split": "random"}])
@pytest.mark.parametrize("repeats", ["first", "last"])
def test_one_action_per_item_is_for_matching(impressions, repeats):
    assert refused({"repeats": repeats, **impressions}).startswith(f"--repeats={repeats} is for --task=match")
    assert build_config({"repeats": repeats}).data.repeats == repeats
    assert build_config({"repeats": "keep", **impressions}).data.repeats == "keep"


# ---------------------------------------------------------------- what fixes a setting


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_fixes_it(name):
    fixed = set(FIELDS[name].metadata["fixed"])
    assert fixed and fixed <= set(PARTS)
    assert fixed == {"free"} or "free" not in fixed


@pytest.mark.parametrize("name", FIELDS)
def test_a_need_names_settings_and_values_that_exist(name):
    types = {name: kind for cls in SECTIONS.values() for name, kind in typing.get_type_hints(cls).items()}
    for need in FIELDS[name].metadata["needs"]:
        assert need
        for other, useful in need.items():
            assert other != name and len(list(useful))
            for value in list(useful):
                if other in KNOWN:
                    assert value in KNOWN[other]
                elif types[other] in (bool, bool | None):
                    assert value in ((True, False) if types[other] is bool else (True, False, None))
                else:
                    choices = [
                        choice
                        for part in (types[other], *typing.get_args(types[other]))
                        if typing.get_origin(part) is typing.Literal
                        for choice in typing.get_args(part)
                    ]
                    assert value in choices, (name, other, value)


def test_all_but_some():
    useful = AnyBut(["softmax"])
    assert "softmax" not in useful and "bce" in useful and "any other" in useful


EVALUATION, RESUME, START = ("model", "data"), ("model", "data", "trajectory"), ("leak",)


def test_an_evaluation_is_of_the_same_model_on_the_same_data():
    fixed = set(fixed_names(build_config({}).flat(), *EVALUATION))
    assert fixed >= {
        "task",
        "model_name",
        "dim",
        "max_len",
        "time_tokens",
        "item_features",
        "action_embedding",
    }
    assert fixed >= {"dataset", "min_item_count", "shuffle_ties", "cold_items", "ctr_split", "positive_from"}
    assert fixed >= {field.name for field in dataclasses.fields(ModelConfig)} - {"dtype"}
    assert not fixed & {field.name for field in dataclasses.fields(TrainConfig)}
    assert not fixed & {"dtype", "ctr_history", "data_dir", "loss", "filter_seen", "device", "ckpt_name"}


def test_a_resumed_run_takes_the_same_steps():
    values = build_config({}).flat()
    fixed = set(fixed_names(values, *RESUME))
    assert fixed > set(fixed_names(values, *EVALUATION))
    assert fixed >= {"loss", "num_negatives", "share_negatives", "exclude_history", "negative_below"}
    assert fixed >= {"lr", "lr_min", "warmup_steps", "batch_size", "seed", "optimizer", "ema", "clip_norm"}
    assert fixed >= {"weight_decay", "embedding_decay", "dtype", "ctr_history"}
    free = {"grad_accum_steps", "patience", "compile", "keep_last", "save_every", "init_from", "data_dir"}
    assert not fixed & (free | {"filter_seen", "resume", "out_dir", "eval_only", "device"})


def test_the_end_of_a_cosine_is_fixed_and_that_of_a_constant_rate_is_not():
    assert "num_epochs" in fixed_names(build_config({}).flat(), *RESUME)
    assert "num_epochs" in fixed_names(build_config({"lr_min": 0.0}).flat(), *RESUME)
    constant = build_config({"lr_min": 1.0}).flat()
    assert set(fixed_names({}, *RESUME)) - set(fixed_names(constant, *RESUME)) == {"num_epochs"}


def test_a_start_from_other_weights_has_the_same_data_to_be_tested_with():
    assert set(fixed_names(build_config({}).flat(), *START)) == {
        "min_item_count", "repeats", "shuffle_ties", "cold_items", "ctr_split", "positive_from",
        "drop_rating", "min_positives", "utc_offset", "positive_label",
    }  # fmt: skip


# ---------------------------------------------------------------- all of them


def test_there_are_few():
    """A new setting should replace another."""
    assert len(FIELDS) <= 85


def test_names_are_unique_over_sections():
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) and "config" not in names
    run = {field.name for name in ("run", "processes") for field in dataclasses.fields(SECTIONS[name])}
    assert build_config({}).flat().keys() == set(names) - run
    assert [field.name for field in dataclasses.fields(Config)] == list(SECTIONS)


def test_written_settings_are_read_again(tmp_path):
    given = {"lr": 5e-5, "dim": 48, "dataset": "123", "loss": "gbce", "compile": True, "weight_decay": 1e-6}
    cfg = build_config(given)
    (tmp_path / "some.yaml").write_text(dump_config(cfg))
    again = build_config(parse_args([f"--config={tmp_path / 'some.yaml'}"]))
    for section in SECTIONS:
        if section not in ("run", "processes"):
            assert getattr(again, section) == getattr(cfg, section)


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads is a switch without effect."""
    read = set()
    for path in SOURCES:
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
                    read |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    # Read through properties of ModelConfig.
    config = ast.parse((ROOT / "reclm" / "config.py").read_text())
    for node in ast.walk(config):
        if isinstance(node, ast.FunctionDef) and node.name in read and node.name != "flat":
            read |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    assert FIELDS.keys() - read == set()


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_load_and_say_how_to_run_them(path):
    text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert f"--config=configs/{path.name}" in header
    given = parse_args([f"--config={path}"])
    cfg = build_config(given)
    assert cfg.model.task in PREPARE and cfg.train.optimizer in OPTIMIZERS
    model = SequenceRecommender(cfg.model, cfg.loss, Vocabulary(50, 10))
    assert model.item_table().shape == (51, cfg.model.dim)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_hold_only_what_differs_from_the_defaults(path):
    defaults = build_config({})
    values = {name: value for section in SECTIONS for name, value in vars(getattr(defaults, section)).items()}
    given = parse_args([f"--config={path}"])
    assert [name for name, value in given.items() if value == values[name]] == []


def test_there_are_recipes():
    assert CONFIGS
