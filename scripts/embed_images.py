"""Image features of items: a folder of posters through an image encoder, one row an item -> a .npy file.

    pip install torchvision
    python scripts/embed_images.py --dataset=ml-1m --folder=posters --out=posters.npy
    python main.py --dataset=ml-1m --item_features=posters.npy

The folder holds <item id>.jpg, .jpeg or .png. --encoder=MODULE:FUNCTION is any function that returns a
torch.nn.Module of images (B, 3, 224, 224), normalised as ImageNet's: your own, whose output is the feature,
or one of torchvision.models (with --weights=DEFAULT, which downloads them), where it is what goes into the
last linear layer, the classifier. An item without a picture gets zeros. All flags of main.py that name data
count.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, os.getcwd())  # for an encoder of your own

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from data import load_dataset
from reclm.config import build_config
from reclm.errors import UserError
from reclm.flags import parse_args

SIZE = 224
MEAN, SCALE = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet
SUFFIXES = (".jpg", ".jpeg", ".png")


def load_encoder(spec: str, weights: str | None) -> nn.Module:
    """MODULE:FUNCTION -> the network, which returns its features. Raises UserError."""
    module, _, name = spec.partition(":")
    try:
        build = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:  # a torchvision of another torch
        raise UserError(f"--encoder={spec}: {error} (MODULE:FUNCTION is needed)") from None
    encoder = build(weights=weights) if weights else build()
    if module.startswith("torchvision."):
        classifier = [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)][-1]
        classifier.forward = lambda features: features
    return encoder.eval()


def read_image(path: Path) -> Tensor:
    """(3, SIZE, SIZE): scaled so that the short side fits, its middle cut out."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is no readable image ({error}): replace or remove it") from None
    scale = SIZE / min(image.size)
    image = image.resize([max(SIZE, round(side * scale)) for side in image.size])
    left, top = ((side - SIZE) // 2 for side in image.size)
    pixels = torch.tensor(np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))) / 255
    return ((pixels - MEAN) / SCALE).permute(2, 0, 1)


@torch.inference_mode()
def embed(encoder: nn.Module, paths: list[Path | None], batch_size: int) -> np.ndarray:
    """(len(paths), F), zeros where there is no path."""
    there = [i for i, path in enumerate(paths) if path]
    parts = [there[first : first + batch_size] for first in range(0, len(there), batch_size)]
    rows = [encoder(torch.stack([read_image(paths[i]) for i in part])).flatten(1) for part in tqdm(parts)]
    features = torch.cat(rows).float().numpy()
    vectors = np.zeros((len(paths), features.shape[1]), dtype=np.float32)
    vectors[there] = features
    return vectors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the images")
    parser.add_argument("--encoder", default="torchvision.models:resnet50", help="MODULE:FUNCTION")
    parser.add_argument("--weights", help="given to the function, e.g. DEFAULT")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    args, others = parser.parse_known_args()
    dataset = load_dataset(build_config(parse_args(others)).data)
    there = {path.stem: path for path in args.folder.glob("*") if path.suffix.lower() in SUFFIXES}
    paths = [there.get(str(item)) for item in dataset.items]
    if not any(paths):
        raise UserError(f"{args.folder} has no image called <item id>.jpg, .jpeg or .png")
    vectors = embed(load_encoder(args.encoder, args.weights), paths, args.batch_size)
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
