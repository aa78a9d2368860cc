"""Prepare interactions once, for trainings that use them as they are. See docs/scale.md.

    python scripts/prepare.py --engine=polars --input='logs/*.parquet' --out=prepared/
    python main.py --dataset=prepared/
    spark-submit --master=yarn scripts/prepare.py --engine=spark --input='logs/*.parquet' --out=prepared/

Every engine writes the same arrays, to the bit, which are those that main.py --dataset='logs/*.parquet' would
make. pandas takes all that main.py reads, and its flags on data, such as --min_item_count=5; the others take
your own files, in all formats of docs/data.md, with the columns user, item, timestamp and rating, and
--columns. Equal rows are dropped. polars and spark: pip install -r requirements-prepare.txt; spark also needs
Java 17.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.config import SECTIONS, build_config
from reclm.data.cache import write_cache
from reclm.data.prepare import make_arrays
from reclm.data.sources import find_dataset
from reclm.engines import by_polars, by_spark
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.run.logger import say
from reclm.run.output import ScriptParser

ENGINES = {
    "pandas": lambda source, cfg, task, work: make_arrays(source, cfg, task),
    "polars": by_polars.make_arrays,
    "spark": by_spark.make_arrays,
}


def read_args() -> tuple[argparse.Namespace, dict]:
    """(our arguments, {name: value} of main.py's flags on data). Raises UserError."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--engine", choices=ENGINES, default="pandas", help="[pandas]")
    parser.add_argument("--input", required=True, help="as --dataset of main.py: files, a pattern, a folder")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    args, others = parser.parse_known_args()
    given = parse_args(others)
    known = {"task", *SECTIONS["data"].__dataclass_fields__} - {"dataset"}
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"--{unknown[0]} does not concern the preparation: give it to main.py")
    args.out = args.out.resolve()
    if args.out.exists():
        raise UserError(f"--out={args.out} exists: choose another name")
    if not args.out.parent.is_dir():
        raise UserError(f"--out={args.out}: there is no folder {args.out.parent}")
    return args, given


def main() -> None:
    args, given = read_args()
    cfg, begin = build_config(given | {"dataset": args.input}), time.time()
    source = find_dataset(args.input, cfg.data.folder)
    if source.reader == "prepared":
        raise UserError(f"--input={args.input} is prepared already: use main.py --dataset={args.input}")
    say(f"reading {len(source.files):,} files with {args.engine}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leave nothing behind
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".preparing-") as work:
        meta, arrays = ENGINES[args.engine](source, cfg.data, cfg.model.task, Path(work))
        say(f"writing {meta['num_rows']:,} rows")
        write_cache(args.out, meta, arrays)
    mask = os.umask(0)
    os.umask(mask)
    args.out.chmod(0o777 & ~mask)  # like any new folder: others may train on it
    for note in meta["notes"]:
        say(f"NOTE: {note}")
    users, items = len(arrays["users"]), len(arrays["items"])
    say(
        f"{args.out}: {users:,} users, {items:,} items, {len(arrays['item_ids']):,} interactions, "
        f"fingerprint {meta['fingerprint']}, {time.time() - begin:.1f} s; train with main.py "
        f"--dataset={args.out}"
    )


if __name__ == "__main__":
    run_script(main)
