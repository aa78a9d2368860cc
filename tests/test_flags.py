"""Flags and YAML files: accepted values and their conversion, and refusals in one line."""

import dataclasses
import re

import pytest

from reclm.config import FIELDS, SECTIONS, ModelConfig, build_config
from reclm.errors import UserError
from reclm.flags import REMOVED, parse_args


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
    given = parse_args(["--lr=5e-4", "--n_layers=4", "--loss=gbce", "--dataset=ml-1m", "--lr_min=1"])
    assert given == {"lr": 5e-4, "n_layers": 4, "loss": "gbce", "dataset": "ml-1m", "lr_min": 1.0}
    assert isinstance(given["lr_min"], float)
    assert parse_args(["--dataset=123"]) == {"dataset": "123"}


@pytest.mark.parametrize(
    "flag",
    [
        "--nonsense=1", "--eval=true", "--num_epoch=3", "--evalonly=true", "--dim=2.5", "--dim=big",
        "--lr=fast", "--eval_only=maybe", "--dtype=float16", "--time_tokens=some", "--n_layers=",
        "--compile=2", "--model.dim=32",
    ],
)  # fmt: skip
def test_unknown_abbreviated_or_mistyped_flags_are_refused(flag):
    assert flag.lstrip("-").split("=")[0] in refused([flag])


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_refused_with_what_to_do_instead(name, yaml):
    assert name not in FIELDS
    wanted = f"--{name} was removed: {REMOVED[name]}"
    assert refused(["--dim=16", f"--{name}=1", "--lr=1"]) == wanted
    message = refused([yaml(f"dim: 16\n{name}: 1\n")])
    assert message.endswith(wanted) and "some.yaml" in message


def test_a_removed_flag_in_every_form():
    for flags in (["--scores=cosine"], ["--scores", "cosine"], ["--scores"], ["--model.scores=cosine"]):
        assert refused(flags) == f"--scores was removed: {REMOVED['scores']}"


def test_a_removed_name_is_meant_only_where_it_names_a_setting(yaml, tmp_path):
    """Not as a value, and not in a file path."""
    assert refused(["--dim=scores"]).startswith("--dim: ")
    assert refused(["--dtype=schedule"]).startswith("--dtype: ")
    assert "was removed" not in refused([yaml("dim: scores\n")])
    missing = refused([f"--config={tmp_path}/scores/schedule.yaml"])
    assert "was removed" not in missing and "schedule.yaml" in missing


def test_config_without_a_file_is_one_line():
    with pytest.raises(UserError, match="--config: expected one argument"):
        parse_args(["--config"])


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


# ---------------------------------------------------------------- YAML


def test_yaml_numbers_in_scientific_notation(yaml):
    """PyYAML alone reads 1e-4 as text."""
    given = parse_args([yaml("lr: 1e-4\nweight_decay: 1E-2\nnum_epochs: 3\n")])
    assert given == {"lr": 1e-4, "weight_decay": 0.01, "num_epochs": 3}
    assert isinstance(given["lr"], float)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense: 1\n", "nonsense"),
        ("model:\n  dim: 32\n", "model"),
        ("dim: 2.5\n", "dim"),
        ("dim: true\n", "dim"),
        ("lr: fast\n", "lr"),
        ("dtype: foo\n", "dtype"),
        ("loss: [bce]\n", "loss"),
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
