"""The flags of scripts that name a model to use."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from reclm.errors import UserError
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
    merged = getattr(args, "adapter", None)
    return load(chosen_model(args), args.titles, args.quantize, merged=merged)


def adapter_files(given: str | None) -> list[Path]:
    """The files that --adapters names: files, separated by commas, or a folder of files or of runs. Raises
    UserError where it holds none."""
    files = [Path(part.strip()) for part in (given or "").split(",") if part.strip()]
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/adapter.safetensors"))
        if not files:
            raise UserError(f"--adapters={folder}: there is no *.safetensors in it or in a folder of it")
    return files


def load(
    path: Path,
    titles: Path | None = None,
    quantize: str = "none",
    adapters: Sequence[Path] = (),
    merged: Path | None = None,
) -> Recommender:
    """The recommender at a path, as Recommender.load gives it, with the titles of a table, if given. Raises
    UserError."""
    recommender = Recommender.load(path, quantize=quantize, adapters=adapters, merged=merged)
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
