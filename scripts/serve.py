"""Serve a trained model over HTTP: a page at /, JSON for programs, its description at /openapi.json.

    python scripts/serve.py                                      # the best checkpoint of the last run
    python scripts/serve.py --ckpt_name=runs/mine/best.pth --port=8080 --watch
    python scripts/serve.py --ckpt_name=exported/                # without torch, see scripts/export.py
    python scripts/serve.py --ckpt_name=base.pth --adapters=markets/   # requests may name an adapter
    curl -H 'Content-Type: application/json' -d '{"items": ["260", "1196"]}' 127.0.0.1:8000/recommend

There is no authentication: to offer it to others, put a proxy that asks who they are in front of it. With
--workers=N each process has a copy of the model, queue and /metrics of its own, and there are no sessions,
which live in one process. A session holds about 2 * n_layers * max_len * dim floats (the default: 0.2 MiB).
"""

import argparse
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a pass is too short to share among threads
sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser
from reclm.serve.choose import adapter_files, add_model_flags, add_quantize, chosen_model
from reclm.serve.service import Limits, Source

LINGER_SECONDS = 3  # in which requests in flight have to end once the server stops
IDLE_SECONDS = 75  # after an answer; longer than the pools of common clients and proxies (60) keep theirs


def number_from(least: int, most: int = 2**31) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} must be {least} to {most}")
        return value

    parse.__name__ = "number"
    return parse


def read_flags() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add_quantize(parser)
    add("--adapters", help="adapters of the checkpoint that requests may name: files, or a folder")
    add("--host", default="127.0.0.1", help="address to listen at [127.0.0.1: this machine alone]")
    add("--port", type=number_from(0, 65535), default=8000, help="0 = any free one [8000]")
    add("--workers", type=number_from(1, 256), default=1, help="processes, one core each [1]")
    add("--watch", action="store_true", help="load the model again when its file is replaced")
    add("--no_users", action="store_true", help="do not show the users of the training data")
    add("--queue", type=number_from(1), default=64, help="requests that may wait; more get 429 [64]")
    add("--max_sessions", type=number_from(0), default=1000, help="the least recently used one ends [1000]")
    add("--max_history", type=number_from(1), default=1000, help="items of one person [1000]")
    return parser.parse_args()


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening socket. Several processes may have a `shared` one at the same port, and the system deals
    out connections evenly. Raises UserError for a port in use and an unknown host."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With protocol 0, as uvicorn's own --workers makes it, asyncio leaves out TCP_NODELAY, and every
        # request on a connection that is kept waits 40 ms for a delayed acknowledgement.
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
        made.listen(2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at {host}, port {port} ({reason}): choose another --port or --host"
        ) from None
    return made


def warn(args: argparse.Namespace, address: str) -> None:
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        histories = "" if args.no_users else " and read the histories of the training data (see --no_users)"
        print(
            f"WARNING: there is no authentication: whoever reaches {address} can use this server{histories}",
            file=sys.stderr,
        )


def work(made: socket.socket, source: Source, limits: Limits, watch: bool) -> None:
    """Load the model and serve it until SIGTERM or SIGINT; then exits with code 0."""
    try:
        import uvicorn

        from reclm.serve.app import make_app
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-serve.txt") from None

    class Server(uvicorn.Server):
        def handle_exit(self, *args) -> None:
            app.state.service.stopping = True
            super().handle_exit(*args)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    if parent := parent_process():
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    model = source.load(limits)
    app = make_app(model, limits, source if watch else None)
    logging.info("process %d serving %s: %s", os.getpid(), source.path, model.recommender.about.trained)
    # No limit_concurrency: it counts idle connections, so that these could keep others out.
    config = uvicorn.Config(
        app, http="httptools", ws="none", log_config=None, log_level="warning", access_log=False,
        proxy_headers=False, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LINGER_SECONDS,
    )  # fmt: skip
    Server(config).run(sockets=[made])


def end_with(parent) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def work_in_process(*args) -> None:
    run_script(lambda: work(*args))


def supervise(sockets: list[socket.socket], *args) -> None:
    """Run `work` in one process per socket, until SIGTERM or SIGINT. Raises UserError when one of
    them ends by itself, after the others have ended, too."""
    context, workers, stopping = get_context("spawn"), [], threading.Event()

    def stop(*_) -> None:
        stopping.set()
        for worker in workers:
            worker.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    for made in sockets:
        worker = context.Process(target=work_in_process, args=(made, *args))
        worker.start()
        workers.append(worker)
    if not stopping.is_set():
        connection.wait([worker.sentinel for worker in workers])
    by_itself = not stopping.is_set()
    stop()
    for worker in workers:
        worker.join()
    if by_itself:
        raise UserError("a worker has ended by itself, so the server ends: see the lines above")


def main() -> None:
    args = read_flags()
    source = Source(chosen_model(args), args.titles, args.quantize, adapter_files(args.adapters))
    sessions = args.max_sessions if args.workers == 1 else 0
    limits = Limits(args.queue, sessions, args.max_history, not args.no_users)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is a file
    made = listen(args.host, args.port)
    host, port = made.getsockname()[:2]
    warn(args, host)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if args.workers == 1:
        work(made, source, limits, args.watch)
    else:
        made.close()  # it has shown that nobody else uses the port
        # With one socket for all, most connections would go to the process that happens to wake up first.
        sockets = [listen(args.host, port, shared=True) for _ in range(args.workers)]
        supervise(sockets, source, limits, args.watch)


if __name__ == "__main__":
    run_script(main)
