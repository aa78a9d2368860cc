"""Flags and YAML files -> {name: value}, each value converted to the type of its field in config.py."""

import re
import sys
from argparse import ArgumentError
from argparse import ArgumentParser as ArgumentParserOfPython
from functools import cache
from pathlib import Path
from typing import get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from reclm.config import FIELDS, SECTIONS
from reclm.errors import UserError

MOST_BYTES = 1_000_000  # of a YAML file
REMOVED = {  # settings of earlier versions and what replaces them; docs/log.md has the measurements
    "schedule": "for a constant learning rate use --lr_min=1",
    "scores": "items are always scored by dot products",
    "temperature": "items are always scored by dot products",
    "random_windows": "it made no difference",
    "attention_norm": "hstu always divides attention by the number of positions attended to",
    "norm_eps": "it is always 1e-6",
    "time_weight": "the weight of the next-time loss is always 0.1",
    "gbce_t": "the calibration of gbce is always 0.75, as in gSASRec",
    "split_seed": "--ctr_split=random always draws the same split",
    "unordered_ok": "ml-1m-m1 needs ml-1m/ratings.dat in --data_dir",
    "pad_to": "a batch is always as wide as its longest sequence",
    "eval_batch_size": "it follows from the number of items and from --max_len",
}


def parse_args(argv: list[str] | None = None) -> dict:
    """{name: value} of the settings given in YAML files (`--config`) or flags, without defaults; flags win.
    `argv` is the command line if None. Raises UserError for an unknown name or a value of another type."""
    argv = name_values(sys.argv[1:] if argv is None else argv)
    files = ArgumentParserOfPython(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        chosen, flags = files.parse_known_args(argv)
    except ArgumentError as error:
        raise UserError(f"{error} (--config=FILE.yaml)") from None
    given = {}
    for path in chosen.config:  # files first, so that flags win wherever they stand on the command line
        check_yaml(Path(path))
        given |= parse([f"--config={path}"], f"{path}: ")
    return given | parse(flags, "")


def name_values(argv: list[str]) -> list[str]:
    """`--describe` alone is `--describe=true`, for all settings that are true or false."""
    known = {f"--{name}" for name, f in FIELDS.items() if f.type in (bool, bool | None)}
    return [
        f"{arg}=true" if arg in known and after.startswith("--") else arg
        for arg, after in zip(argv, [*argv[1:], "--"], strict=False)
    ]


def check_yaml(path: Path) -> None:
    """Raises UserError for what a small YAML file of settings is not: a device, megabytes, or aliases, which
    a few lines can expand without end."""
    if path.exists() and not path.is_file():
        raise UserError(f"--config={path} is not a file")
    if not path.exists():
        return  # the parser names it
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"--config={path} has more than {MOST_BYTES:,} bytes: it is no file of settings")
    try:
        events = list(yaml.parse(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # the parser names the line
    if any(isinstance(event, yaml.AliasEvent) for event in events):
        raise UserError(f"--config={path} has YAML aliases (*name): write the values out")


@cache
def build_parser(with_help: bool = False) -> ArgumentParser:
    """`with_help` adds the help texts of the fields, which take longer than all the rest."""
    set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    parser = ArgumentParser(prog="main.py", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the flags below")
    for cls in SECTIONS.values():
        parser.add_class_arguments(cls, None, as_group=True)
    return parser


def parse(argv: list[str], where: str) -> dict:
    """{name: value} of one source of settings. An error message starts with `where`."""
    with_help = not {"-h", "--help"}.isdisjoint(argv)
    try:
        given = vars(build_parser(with_help).parse_args(argv, defaults=False))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}{explain(str(error))}") from None
    given.pop("config", None)
    refuse_null(given, where)
    return given


def refuse_null(given: dict, where: str = "") -> None:
    """Raises UserError where a setting that needs a value has none: the parser takes null for any type."""
    for name, value in given.items():
        if value is None and type(None) not in get_args(FIELDS[name].type):
            raise UserError(f"{where}--{name} is null, but needs a value: leave it out for the default")


def parse_settings(values: dict) -> dict:
    """Settings from a file that is not YAML, such as a checkpoint, checked like those of a YAML file. Raises
    UserError for an unknown name or a value of another type."""
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise UserError(f"there is no setting {unknown[0]!r:.60}")
    try:
        given = vars(build_parser().parse_object(values, defaults=False))
    except (ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise UserError(explain(str(error))) from None
    refuse_null(given)
    return given


def explain(text: str) -> str:
    """Rewrite an error message of jsonargparse, which takes several lines, as one line about a flag."""
    text = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(text.split()))
    text = re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", text)
    for name in re.findall(r"(?:--(?:\w+\.)*|Option ')(\w+)", text):
        if name in REMOVED:
            return f"--{name} was removed: {REMOVED[name]}"
    return f"{text} (python main.py --help lists all flags)"
