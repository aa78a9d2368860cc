"""Embed item images, such as posters, with an image model and write a .npy file with one row per item.

    pip install -r requirements-features.txt
    python scripts/embed_images.py --dataset=ml-1m --folder=posters --out=posters.npy
    python main.py --dataset=ml-1m --item_features=posters.npy

The folder contains <item id>.jpg, .jpeg or .png; an item without an image gets zeros. --model is any timm
model: the features are the output of its last pooling, and images are resized, cropped and normalised by its
data config. Weights come from the Hugging Face hub or from --weights, a state dict with timm's parameter
names. The flags of main.py for data apply. Runs on the CPU.
"""

import sys
import textwrap
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.library import define
from tqdm import tqdm

from data import load_dataset
from reclm.config import build_config
from reclm.errors import UserError, first_line, run_script
from reclm.flags import parse_args
from reclm.run.output import ScriptParser, add_out, check_out, save_array

SUFFIXES = (".jpg", ".jpeg", ".png")
Transform = Callable[[Image.Image], Tensor]


def import_timm() -> ModuleType:
    """The module timm, with any build of torch. Raises UserError if it cannot be imported."""
    try:
        try:
            import torchvision  # noqa: F401 - timm imports it
        except RuntimeError:
            # The Linux wheel of torchvision is compiled against CUDA. With a CPU build of torch its operators
            # do not load, and its import fails at the first of these two. timm calls neither, so declaring
            # them is enough.
            for name in ("torchvision::nms", "torchvision::qnms"):
                define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
        import timm.data

        return timm
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"cannot import timm ({first_line(error)}): pip install -r requirements-features.txt"
        ) from None


def load_model(name: str, weights: Path | None) -> tuple[nn.Module, Transform]:
    """(the model without its classifier, in evaluation mode; the transform of its input images). Raises
    UserError if the model is unknown or its weights cannot be loaded."""
    timm = import_timm()
    known = timm.list_models() + timm.list_pretrained()  # resnet50, and resnet50.a1_in1k
    if name not in known:
        close = get_close_matches(name, known, cutoff=0.4)
        hint = f"the closest: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise UserError(f"--model={name} is not a timm model ({hint})")
    model = from_file(timm, name, weights) if weights else from_hub(timm, name)
    config = timm.data.resolve_data_config({}, model=model)
    return model.eval(), timm.data.create_transform(**config)


def from_hub(timm: ModuleType, name: str) -> nn.Module:
    """The model with pretrained weights. Raises UserError if they cannot be downloaded."""
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub client raises many types; each means "no weights"
        raise UserError(
            f"cannot get the weights of {name} from the Hugging Face hub ({first_line(error).strip()}): "
            "set --weights=FILE"
        ) from None


def from_file(timm: ModuleType, name: str, path: Path) -> nn.Module:
    """The model with the weights of a state dict. Raises UserError if the file is missing or does not fit."""
    if not path.is_file():
        raise UserError(f"--weights={path} does not exist: name a .pth or .safetensors file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write; they are refused below
            state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # damaged files raise many types
        raise UserError(f"--weights={path} is truncated or not a state dict ({first_line(error)})") from None
    model = timm.create_model(name)
    whole = set(model.state_dict())
    model.reset_classifier(0)
    classifier = whole - set(model.state_dict())  # the file may have these, with any number of classes
    try:
        model.load_state_dict({key: value for key, value in state.items() if key not in classifier})
    except RuntimeError as error:
        mismatch = textwrap.shorten(str(error).partition("\n")[2], 150)  # the first line names the class
        raise UserError(f"--weights={path} does not fit --model={name}: {mismatch}") from None
    return model


def read_image(path: Path) -> Image.Image:
    """The image as RGB. Raises UserError if it cannot be read."""
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"{path} is not a readable image ({first_line(error)}): replace or remove it"
        ) from None


@torch.inference_mode()
def embed(model: nn.Module, transform: Transform, paths: list[Path | None], batch_size: int) -> np.ndarray:
    """(len(paths), F) float32, zeros where the path is None. Raises UserError if an image cannot be read."""
    there = [i for i, path in enumerate(paths) if path]
    parts = [there[first : first + batch_size] for first in range(0, len(there), batch_size)]
    rows = [model(torch.stack([transform(read_image(paths[i])) for i in part])) for part in tqdm(parts)]
    features = torch.cat(rows).numpy()
    vectors = np.zeros((len(paths), features.shape[1]), dtype=np.float32)
    vectors[there] = features
    return vectors


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of images <item id>.jpg, .jpeg, .png"
    )
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm model [default: %(default)s]")
    parser.add_argument("--weights", type=Path, help=".pth or .safetensors file to use instead of a download")
    parser.add_argument("--batch_size", type=int, default=32, help="images per pass [default: %(default)s]")
    add_out(parser, ".npy file")
    args, others = parser.parse_known_args()
    check_out(args, [".npy"])
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1")
    dataset = load_dataset(build_config(parse_args(others)).data)
    there = {path.stem: path for path in args.folder.glob("*") if path.suffix.lower() in SUFFIXES}
    paths = [there.get(str(item)) for item in dataset.items]
    if not any(paths):
        raise UserError(f"{args.folder} has no image named <item id>.jpg, .jpeg or .png")
    vectors = embed(*load_model(args.model, args.weights), paths, args.batch_size)
    save_array(args.out, vectors)
    print(
        f"{args.out}: {len(vectors):,} items, {vectors.shape[1]} numbers each, of "
        f"{sum(map(bool, paths)):,} images"
    )


if __name__ == "__main__":
    run_script(main)
