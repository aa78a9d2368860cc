"""The flags of scripts that name a model to use."""

import argparse
from pathlib import Path

from reclm.serve.recommender import Recommender


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt_name",
        default="best.pth",
        help="checkpoint, a file name in out_dir or a path, or a folder that scripts/export.py has written "
        "[best.pth]",
    )
    parser.add_argument("--out_dir", help="folder of the run [runs/latest, or that of the checkpoint]")
    parser.add_argument("--from_hub", help="instead: a model of the Hugging Face hub, owner/name")
    parser.add_argument("--titles", type=Path, help="titles of items that have none: movies.dat or a table")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=["none", "int8", "int4"],
        default="none",
        help="store weights as integers: a quarter or a seventh of the bytes (docs/shrink.md) [none]",
    )


def open_recommender(args: argparse.Namespace) -> Recommender:
    """The recommender that the flags name. Raises UserError if there is none."""
    return load(chosen_model(args), args.titles, args.quantize)


def load(path: Path, titles: Path | None = None, quantize: str = "none") -> Recommender:
    """The recommender at a path, with the titles of a table, if given. Raises UserError."""
    recommender = Recommender.load(path, quantize=quantize)
    if titles is not None:
        from reclm.serve.titles import with_titles  # pandas

        recommender.catalogue = with_titles(recommender.catalogue, titles)
    return recommender


def chosen_model(args: argparse.Namespace) -> Path:
    """The file or folder that the flags name, fetched from the hub if need be. Raises UserError."""
    if args.from_hub is not None:
        from reclm.serve.hub import fetch

        return fetch(args.from_hub)
    return model_path(args.ckpt_name, args.out_dir)


def model_path(ckpt_name: str, out_dir: str | None = None) -> Path:
    """The file or folder to load. Raises UserError if there is none."""
    if Path(ckpt_name).is_dir() and out_dir is None:
        return Path(ckpt_name)
    from reclm.run import checkpoint, folder  # torch, which an exported model does without

    given = {"ckpt_name": ckpt_name} | ({"out_dir": out_dir} if out_dir else {})
    return checkpoint.find_checkpoint(ckpt_name, folder.chosen_dir(given))
