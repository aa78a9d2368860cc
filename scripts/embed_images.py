"""Image features of items: a folder of posters through an image encoder, one row per item -> a .npy file.

    pip install -r requirements-features.txt
    python scripts/embed_images.py --dataset=ml-1m --folder=posters --out=posters.npy
    python scripts/embed_images.py --dataset=ml-1m --folder=posters --out=posters.npy --weights=lite0.pth
    python main.py --dataset=ml-1m --item_features=posters.npy

The folder holds <item id>.jpg, .jpeg or .png. --model is any encoder of timm, with its own way to prepare a
picture; the feature is the output of its last pooling. Its weights are downloaded from the Hugging Face hub,
or read from --weights, a .pth or .safetensors file with timm's names. An item without a picture gets zeros.
All flags of main.py for data count.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from data import load_dataset
from reclm.config import build_config
from reclm.errors import UserError, first_line
from reclm.flags import parse_args

SUFFIXES = (".jpg", ".jpeg", ".png")


def import_timm():
    """timm, which imports torchvision. The wheel of torchvision is made for CUDA builds of torch and does not
    load with a CPU build, which lacks two operators for object detection: they are declared, never called."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    except ImportError:
        pass  # timm says it better
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{first_line(error)}: pip install -r requirements-features.txt") from None
    return timm


def load_encoder(name: str, weights: Path | None) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """The network, which returns the output of its last pooling, and what turns a picture into its input.
    Raises UserError."""
    timm = import_timm()
    if name not in timm.list_models():
        close = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "timm.list_models()"
        raise UserError(f"--model={name} is no model of timm; the closest are: {close}")
    try:
        encoder = timm.create_model(name, pretrained=weights is None, num_classes=0).eval()
    except Exception as error:  # no network, no such weights: the hub's client has many
        raise UserError(f"no weights of {name} ({first_line(error)}): name a file with --weights") from None
    if weights:
        load_weights(encoder, weights)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder), is_training=False)
    return encoder, prepare


def load_weights(encoder: nn.Module, path: Path) -> None:
    """From a .pth or .safetensors file, which may have a classifier as well. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        encoder.load_state_dict({name: found[name] for name in encoder.state_dict()})
    except KeyError as error:
        raise UserError(f"--weights={path} is of another model than --model: it has no {error}") from None
    except Exception as error:  # damaged bytes raise nearly anything
        raise UserError(f"--weights={path} cannot be read ({first_line(error)}): use another file") from None


def read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is no readable image ({error}): replace or remove it") from None


@torch.inference_mode()
def embed(encoder: nn.Module, prepare: Callable, paths: list[Path | None], batch_size: int) -> np.ndarray:
    """(len(paths), F), zeros where there is no path."""
    there = [i for i, path in enumerate(paths) if path]
    parts = [there[first : first + batch_size] for first in range(0, len(there), batch_size)]
    rows = [encoder(torch.stack([prepare(read_image(paths[i])) for i in part])) for part in tqdm(parts)]
    features = torch.cat(rows).float().numpy()
    vectors = np.zeros((len(paths), features.shape[1]), dtype=np.float32)
    vectors[there] = features
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the images")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a name that timm knows")
    parser.add_argument("--weights", type=Path, help="of the model [default: timm's, downloaded]")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    args, others = parser.parse_known_args()
    if args.out.exists():
        raise UserError(f"--out={args.out} exists and is not overwritten: name another file")
    dataset = load_dataset(build_config(parse_args(others)).data)
    there = {path.stem: path for path in args.folder.glob("*") if path.suffix.lower() in SUFFIXES}
    paths = [there.get(str(item)) for item in dataset.items]
    if not any(paths):
        raise UserError(f"{args.folder} has no image called <item id>.jpg, .jpeg or .png")
    vectors = embed(*load_encoder(args.model, args.weights), paths, args.batch_size)
    np.save(args.out, vectors)
    print(
        f"{args.out}: {len(vectors):,} items, {vectors.shape[1]} numbers each, of "
        f"{sum(map(bool, paths)):,} images"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
