"""Flags and YAML files: what is accepted, what is refused, and that every setting is used."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from model import SequenceRecommender
from reclm.config import SECTIONS, Config, ModelConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.flags import parse_args
from reclm.run.folder import dump_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SOURCES = [ROOT / f"{name}.py" for name in ("main", "model", "data", "evaluate")]
SOURCES += sorted((ROOT / "reclm").glob("*.py"))


@pytest.fixture
def yaml(tmp_path):
    def write(text, name="some.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def refused(argv):
    """The one line that refuses these arguments."""
    with pytest.raises(UserError) as caught:
        build_config(parse_args(argv))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


# ---------------------------------------------------------------- flags


def test_nothing_said_is_the_defaults():
    assert parse_args([]) == {}
    cfg = build_config({})
    for section, cls in SECTIONS.items():
        assert getattr(cfg, section) == cls()


@pytest.mark.parametrize("spelling", ["true", "True", "TRUE", "false", "False", "FALSE"])
def test_booleans_in_flags_and_yaml(spelling, yaml):
    truth = spelling.lower() == "true"
    assert parse_args([f"--eval_only={spelling}"]) == {"eval_only": truth}
    assert parse_args(["--eval_only", spelling]) == {"eval_only": truth}
    assert parse_args([yaml(f"filter_seen: {spelling}\n")]) == {"filter_seen": truth}


def test_values_are_converted_by_the_declared_type():
    said = parse_args(["--lr=5e-4", "--n_layers=4", "--loss=gbce", "--dataset=ml-1m", "--lr_min=1"])
    assert said == {"lr": 5e-4, "n_layers": 4, "loss": "gbce", "dataset": "ml-1m", "lr_min": 1.0}
    assert isinstance(said["lr_min"], float)
    assert parse_args(["--dataset=123"]) == {"dataset": "123"}


@pytest.mark.parametrize(
    "flag",
    [
        "--nonsense=1", "--eval=true", "--num_epoch=3", "--evalonly=true", "--dim=2.5", "--dim=big",
        "--loss=foo", "--lr=fast", "--eval_only=maybe", "--dtype=float16", "--model_name=bert", "--n_layers=",
        "--compile=2", "--model.dim=32",
    ],
)  # fmt: skip
def test_unknown_abbreviated_or_mistyped_flags_are_refused(flag):
    assert flag.lstrip("-").split("=")[0] in refused([flag])


@pytest.mark.parametrize(
    "flag",
    [
        "--dim=0", "--dim=-8", "--n_layers=0", "--max_len=0", "--temperature=0", "--n_kv_heads=-1",
        "--window=-1", "--dropout=1", "--dropout=-0.1", "--min_item_count=0", "--num_negatives=0",
        "--gbce_t=1.5", "--num_epochs=0", "--batch_size=0", "--lr=0", "--lr=-1", "--lr=nan", "--lr=inf",
        "--weight_decay=-1", "--lr_min=2", "--clip_norm=-1", "--grad_accum_steps=0", "--patience=-1",
        "--seed=-1", "--eval_batch_size=0", "--keep_last=-1", "--warmup_steps=-1", "--norm_eps=0",
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(flag):
    assert flag.split("=")[0] in refused([flag])


def test_heads_must_divide_the_width():
    assert "--n_heads=3" in refused(["--dim=64", "--n_heads=3"])
    assert "even" in refused(["--dim=6", "--n_heads=2"])  # heads of width 3 have no pairs to rotate
    assert "--n_kv_heads=3" in refused(["--dim=64", "--n_heads=4", "--n_kv_heads=3"])
    assert "--n_kv_heads=8" in refused(["--dim=64", "--n_heads=4", "--n_kv_heads=8"])


def test_derived_widths():
    assert ModelConfig(dim=64).ffn_dim == 192  # 170.7, rounded up to a multiple of 32
    assert ModelConfig(dim=96).ffn_dim == 256  # exactly 8/3
    assert ModelConfig(dim=64, hidden_dim=50).ffn_dim == 50
    assert ModelConfig(n_heads=2).kv_heads == 2 and ModelConfig(n_heads=2, n_kv_heads=1).kv_heads == 1


# ---------------------------------------------------------------- YAML


def test_yaml_numbers_in_scientific_notation(yaml):
    """PyYAML alone reads 1e-4 as text."""
    said = parse_args([yaml("lr: 1e-4\nweight_decay: 1E-2\nnum_epochs: 3\n")])
    assert said == {"lr": 1e-4, "weight_decay": 0.01, "num_epochs": 3}
    assert isinstance(said["lr"], float)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense: 1\n", "nonsense"),
        ("model:\n  dim: 32\n", "model"),
        ("dim: 2.5\n", "dim"),
        ("dim: true\n", "dim"),
        ("lr: fast\n", "lr"),
        ("loss: foo\n", "loss"),
        ("eval_only: 1\n", "eval_only"),
        ("dim: [1, 2]\n", "dim"),
        ("dim: 0\n", "dim"),
        ("dim:\n", "dim"),
        ("just text", "config"),
        ("- a\n- b\n", "config"),
        ("a: b: c: [", "config"),
        ("\x00\x01\x02", "config"),
    ],
)
def test_bad_yaml_is_refused(text, named, yaml):
    assert named in refused([yaml(text)])


def test_missing_yaml_is_refused(tmp_path):
    assert f"{tmp_path}/no.yaml" in refused([f"--config={tmp_path}/no.yaml"])
    refused([f"--config={tmp_path}"])  # a folder


def test_flags_override_yaml_overrides_defaults(yaml):
    cfg = build_config(parse_args([yaml("dim: 32\nlr: 0.5\n"), "--dim=16"]))
    assert (cfg.model.dim, cfg.train.lr, cfg.model.n_layers) == (16, 0.5, ModelConfig().n_layers)


def test_flags_override_yaml_wherever_they_stand(yaml):
    assert parse_args(["--dim=16", yaml("dim: 32\nlr: 0.5\n")]) == {"dim": 16, "lr": 0.5}


def test_the_last_of_two_yaml_files_wins(yaml):
    argv = [yaml("dim: 32\nlr: 0.5\n", "a.yaml"), yaml("dim: 48\n", "b.yaml")]
    assert parse_args(argv) == {"dim": 48, "lr": 0.5}


def test_written_settings_are_read_again(yaml):
    said = {"lr": 5e-5, "dim": 48, "dataset": "123", "loss": "gbce", "compile": True, "norm_eps": 1e-6}
    cfg = build_config(said)
    again = build_config(parse_args([yaml(dump_config(cfg))]))
    for section in SECTIONS:
        if section != "run":
            assert getattr(again, section) == getattr(cfg, section)


# ---------------------------------------------------------------- all of them


def test_names_are_unique_over_sections():
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) and "config" not in names
    run = {field.name for field in dataclasses.fields(SECTIONS["run"])}
    assert build_config({}).flat().keys() == set(names) - run
    assert [field.name for field in dataclasses.fields(Config)] == list(SECTIONS)


def test_every_setting_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out.split("options:")[1]
    for cls in SECTIONS.values():
        for field in dataclasses.fields(cls):
            entry = re.search(rf"--{field.name}[ =].*?(?=\n  --|\n\n|\Z)", text, re.S)
            # Beyond the flag, its choices and "(type: int, default: 3)".
            words = re.sub(r"\(type:.*|\(default:.*", "", entry[0], flags=re.S).split()[2:]
            assert words, field.name


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
    names = {field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)}
    assert names - read == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_load_and_say_how_to_run_them(path):
    text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert f"--config=configs/{path.name}" in header
    said = parse_args([f"--config={path}"])
    cfg = build_config(said)
    model = SequenceRecommender(cfg.model, cfg.loss, Vocabulary(50, 10))
    assert model.item_table().shape == (51, cfg.model.dim)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_hold_only_what_differs_from_the_defaults(path):
    defaults = build_config({})
    values = {name: value for section in SECTIONS for name, value in vars(getattr(defaults, section)).items()}
    said = parse_args([f"--config={path}"])
    assert [name for name, value in said.items() if value == values[name]] == []


def test_there_are_recipes():
    assert CONFIGS


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss=softmax", "--num_negatives=5"],
        ["--loss=softmax", "--share_negatives=false"],
        ["--loss=bce", "--gbce_t=0.5"],
        ["--scores=dot", "--temperature=0.1"],
        ["--schedule=constant", "--lr_min=0.2"],
        ["--model_name=hstu", "--gated_residuals=true"],
        ["--model_name=llama --time_tokens=none", "--request_time=true"],
    ],
)
def test_a_switch_without_effect_is_refused(flags):
    idle, _, value = flags[1].partition("=")
    with pytest.raises(UserError, match=f"{idle}=(?i:{value}) has no effect with {flags[0]}"):
        build_config(parse_args([*flags[0].split(), flags[1]]))


@pytest.mark.parametrize("useful", ["--model_name=hstu", "--time_tokens=embedding"])
def test_one_of_two_switches_gives_another_its_effect(useful):
    assert build_config(parse_args([useful, "--request_time=true"])).model.request_time


def test_items_left_out_of_the_loss_cannot_be_ranked():
    with pytest.raises(UserError, match="--filter_seen=false .* train with --exclude_history=false"):
        build_config(parse_args(["--filter_seen=false"]))
    cfg = build_config(parse_args(["--filter_seen=false", "--exclude_history=false"]))
    assert not cfg.eval.filter_seen and not cfg.loss.exclude_history


def test_config_without_a_file_is_one_line():
    with pytest.raises(UserError, match="--config: expected one argument"):
        parse_args(["--config"])
