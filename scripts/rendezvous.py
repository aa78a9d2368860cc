"""Serve the store at which hosts meet, in a process of its own: no host then must stay up for the others.

    python scripts/rendezvous.py --port=29500

    torchrun --nnodes=1:2 --nproc_per_node=1 --max-restarts=9 --rdzv-backend=c10d --rdzv-id=run \\
        --rdzv-endpoint=HOST:29500 --rdzv-conf=is_host=0 main.py --resume=auto --out_dir=FOLDER  # on each
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.distributed import DistNetworkError, TCPStore

from reclm.errors import UserError, first_line, run_script
from reclm.run.logger import say
from reclm.run.output import ScriptParser


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--host", default="0.0.0.0", help="address to listen at [all]")
    parser.add_argument("--port", type=int, default=29500, help="[29500]")
    args = parser.parse_args()
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port={args.port} must be 0 to 65535; 0 takes a free one")
    try:
        store = TCPStore(args.host, args.port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        raise UserError(f"cannot serve at {args.host}:{args.port} ({first_line(error)})") from None
    say(f"serving at {args.host}:{store.port}; Ctrl-C ends it")
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    run_script(main)
