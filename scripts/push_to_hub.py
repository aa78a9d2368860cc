"""Publish a trained model on the Hugging Face hub, with a model card made from the records of its run.

    python scripts/push_to_hub.py --repo=owner/name --dry_run=model     # write it, upload nothing
    python scripts/push_to_hub.py --repo=owner/name --ckpt_name=runs/latest/best.pth
    python scripts/recommend.py --from_hub=owner/name --history=260     # from any machine

The repository gets model.safetensors, items.json, config.json and README.md, and nothing about single users
(reclm/serve/hub.py). The token is that of `hf auth login`, or $HF_TOKEN; $HF_ENDPOINT replaces the server.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from model_card import Published, write_card

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser, writing
from reclm.serve import hub
from reclm.serve.choose import model_path


def write(args: argparse.Namespace, path: Path, out: Path) -> None:
    """Write the model of the checkpoint at `path` and its card into `out`. Raises UserError."""
    state = hub.write_model(path, out, titles=args.with_titles)
    about = Published(state, path, out, args.repo, args.licence)
    write_card(about)
    if about.result is None:
        print(
            f"NOTE: no finished run beside {path} has a result.json about these weights, so the card has no "
            "test metrics: publish best.pth of a finished run"
        )


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="name of the model on the hub")
    parser.add_argument("--ckpt_name", default="best.pth", help="file name in out_dir, or a path")
    parser.add_argument("--out_dir", help="folder of the run [default: runs/latest, or that of ckpt_name]")
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument("--dry_run", type=Path, metavar="FOLDER", help="write into FOLDER; upload nothing")
    parser.add_argument("--licence", help="of the weights, as the hub names it, e.g. mit [default: other]")
    parser.add_argument(
        "--with_titles", action="store_true", help="titles and genres of the items, too; not of MovieLens"
    )
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo, re.ASCII):
        raise UserError(f"--repo={args.repo} is no name on the hub: it is like owner/name")
    if args.licence is not None and not re.fullmatch(r"[a-z0-9.+-]+", args.licence):
        raise UserError(
            f"--licence={args.licence} is no name of a licence on the hub, such as mit or cc-by-4.0"
        )
    path = model_path(args.ckpt_name, args.out_dir)
    if args.dry_run:
        out = args.dry_run
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"--dry_run={out} is not an empty folder: choose another name")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        write(args, path, out)
        print(f"written to {out}/, nothing uploaded: read {out / hub.CARD}")
        return
    with tempfile.TemporaryDirectory() as out:
        write(args, path, Path(out))
        print(f"uploaded to {hub.push(Path(out), args.repo, args.private)}")


if __name__ == "__main__":
    run_script(main)
