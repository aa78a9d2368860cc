"""Flags and YAML files -> {name: value}, converted by the declared type of each setting in config.py."""

import re
from argparse import ArgumentError
from argparse import ArgumentParser as ArgumentParserOfPython

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from reclm.config import SECTIONS
from reclm.errors import UserError

REMOVED = {  # settings of earlier versions: what to do instead; docs/log.md has the measurements
    "schedule": "for a constant rate use --lr_min=1",
    "scores": "items are scored by dot products",
    "temperature": "items are scored by dot products",
    "random_windows": "it changed nothing",
    "attention_norm": "attention of hstu is divided by the number of positions attended to",
    "norm_eps": "it is 1e-6",
    "time_weight": "the next-time loss has the weight 0.1",
    "gbce_t": "gbce has gSASRec's calibration 0.75",
    "split_seed": "--ctr_split=random has one split",
    "unordered_ok": "put ratings.dat beside the lists of ml-1m-m1",
    "pad_to": "a batch is as wide as its longest sequence",
    "eval_batch_size": "it follows from the sizes of the catalogue and of a history",
}


def parse_args(argv: list[str] | None = None) -> dict:
    """{name: value} of what the user gave, in YAML files (`--config`) or in flags. Raises UserError."""
    files = ArgumentParserOfPython(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        chosen, flags = files.parse_known_args(argv)
    except ArgumentError as error:
        raise UserError(f"{error} (--config=FILE.yaml)") from None
    given = {}
    for path in chosen.config:  # flags win over files, wherever they stand on the line
        given |= parse([f"--config={path}"], f"{path}: ")
    return given | parse(flags, "")


def parse(argv: list[str], where: str) -> dict:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # help texts of the fields
    parser = ArgumentParser(prog="main.py", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the names below")
    for cls in SECTIONS.values():
        parser.add_class_arguments(cls, None, as_group=True)
    try:
        given = vars(parser.parse_args(argv, defaults=False))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{where}{explain(str(error))}") from None
    given.pop("config", None)
    return given


def explain(text: str) -> str:
    """jsonargparse explains over several lines, in terms of its own; ours is one line about a name."""
    text = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(text.split()))
    text = re.sub(r"<class '(\w+)'>|typing\.(?=Literal)", r"\1", text)
    for name in re.findall(r"(?:--(?:\w+\.)*|Option ')(\w+)", text):
        if name in REMOVED:
            return f"--{name} is no setting any more: {REMOVED[name]}"
    return f"{text} (python main.py --help lists all names)"
