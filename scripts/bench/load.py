"""The part of scripts/bench/serve.py that puts scripts/serve.py under load."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from measure import say
from passes import latency, run

from reclm.errors import UserError

if TYPE_CHECKING:
    from serve import Bench

SERVER = Path(__file__).resolve().parents[1] / "serve.py"
HISTORY = 100  # items of a request
BODIES = 64  # different requests
SECONDS, WARM_UP = 2.0, 0.5  # of a figure; requests that end in the warm-up do not count
CONNECTIONS = (1, 16)
WORKERS = (1, 2)
BURST = ((2.0, 16), (3.0, 160), (4.0, 16))  # (seconds, connections): before, during and after
WINDOW = 0.5  # seconds; after a burst, each has a 99th percentile of its own
BACK = 1.5  # times the 99th percentile before the burst: what counts as back to normal
SOAKING = 4  # connections
START = 90.0  # seconds that a server may take


@dataclass
class Server:
    process: psutil.Popen
    port: int

    def memory(self) -> float:
        """Resident MiB of all its processes"""
        tree = [self.process, *self.process.children(recursive=True)]
        return sum(part.memory_info().rss for part in tree) / 2**20


@contextmanager
def serving(model: Path, workers: int, log: Path) -> Iterator[Server]:
    """A server on a free port, once it answers. Raises UserError with the end of its log if it does not."""
    command = [sys.executable, SERVER, f"--ckpt_name={model}", "--port=0", f"--workers={workers}"]
    with open(log, "w") as errors:
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        port = int(process.stdout.readline().strip().rpartition(":")[2] or 0)
        end = time.monotonic() + START
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise UserError(f"scripts/serve.py does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(process, port)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def to_send(bench: "Bench") -> list[str]:
    """Requests for ten items after HISTORY items of the catalogue"""
    rng, ids = np.random.default_rng(0), bench.recommender.catalogue.ids
    found = []
    for _ in range(BODIES):
        body = json.dumps({"items": [ids[item] for item in rng.integers(0, len(ids), HISTORY)], "k": 10})
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}"
        found.append(f"POST /recommend HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\n\r\n{body}")
    return found


def send(server: Server, requests: list[str], phases: list[tuple[float, int]], work: Path) -> np.ndarray:
    """Rows (n, 3) of run_client.py: seconds since the beginning, milliseconds, status"""
    file, result = work / "client.json", work / "client.npy"
    spec = {"port": server.port, "requests": requests, "phases": phases, "result": str(result)}
    file.write_text(json.dumps(spec))
    run([sys.executable, Path(__file__).with_name("run_client.py"), file])
    return np.load(result).reshape(-1, 3)


def part_of(rows: np.ndarray, begin: float, end: float = np.inf) -> np.ndarray:
    """Those that ended from `begin` on and before `end`"""
    return rows[(rows[:, 0] >= begin) & (rows[:, 0] < end)]


def figures(rows: np.ndarray, seconds: float) -> dict[str, float]:
    """Of the requests that were answered with 200 within so many seconds"""
    good = rows[rows[:, 2] == 200]
    if not len(good):
        raise UserError(f"the server answered no request with 200, but {statuses(rows)}")
    return {"requests/s": len(good) / seconds} | latency(good[:, 1])


def statuses(rows: np.ndarray) -> dict[str, int]:
    """{"200": number of answers}; "0" is a lost connection"""
    found, counts = np.unique(rows[:, 2].astype(int), return_counts=True)
    return dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))


def burst_figures(rows: np.ndarray) -> dict[str, float]:
    """99th percentiles before, during and after a burst, and the seconds from its end until the p99 of a
    window was back; and the shares of answers during the burst that were 200, or refused with 429."""
    first, second = BURST[0][0], BURST[0][0] + BURST[1][0]
    before, during = part_of(rows, min(WARM_UP, first / 2), first), part_of(rows, first, second)
    after, good = part_of(rows, second), rows[rows[:, 2] == 200]
    usual = figures(before, 1)["p99, ms"]
    back = BURST[2][0]  # not within what was watched
    for begin in np.arange(0, BURST[2][0], WINDOW):
        window = part_of(good, second + begin, second + begin + WINDOW)
        if len(window) and np.percentile(window[:, 1], 99) <= BACK * usual:
            back = float(begin)
            break
    return {
        "p99 before, ms": usual,
        "p99 during, ms": figures(during, 1)["p99, ms"],
        "p99 after, ms": figures(after, 1)["p99, ms"],
        "seconds until back": back,
        "answered with 200": float((during[:, 2] == 200).mean()),
        "refused with 429": float((during[:, 2] == 429).mean()),
        "other answers": float((~np.isin(rows[:, 2], (200, 429))).sum()),
    }


def soak(server: Server, requests: list[str], seconds: float, work: Path) -> dict:
    """Errors, latency and memory of a long time under load"""
    begin = server.memory()
    rows = send(server, requests, [(seconds, SOAKING)], work)
    memory = {"MiB at the begin": begin, "MiB at the end": server.memory()}
    counted = statuses(rows)
    errors = len(rows) - counted.get("200", 0)
    return figures(rows, seconds) | memory | {"errors": errors, "requests": len(rows), "seconds": seconds}


def http(bench: "Bench") -> dict:
    """requests/s and ms of each runtime with one and two workers, of an empty request, and of bursts; with
    --soak also of a long time"""
    requests, health = to_send(bench), ["GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
    rounds, log = {}, bench.work / "server.log"

    def measure(server: Server, name: str, what: list[str]) -> None:
        for connections in CONNECTIONS:
            rows = part_of(send(server, what, [(WARM_UP + SECONDS, connections)], bench.work), WARM_UP)
            row = figures(rows, SECONDS) | {"other answers": float((rows[:, 2] != 200).sum())}
            rounds.setdefault(f"{name}, {connections} at once", []).append(row)

    for _ in range(bench.args.rounds):
        for runtime, model in bench.models.items():
            for workers in WORKERS:
                with serving(model, workers, log) as server:
                    measure(server, f"{runtime}, {workers} worker{'s'[: workers - 1]}", requests)
                    if workers == 1:
                        rows = send(server, requests, BURST, bench.work)
                        rounds.setdefault(f"{runtime}, burst", []).append(burst_figures(rows))
                    if workers == 1 and runtime == "torch":
                        measure(server, "empty", health)
    found = {"rounds": rounds}
    if bench.args.soak:
        say(f"http: {bench.args.soak:.0f} s under load ...")
        with serving(bench.models["torch"], 1, log) as server:
            send(server, requests, [(min(5.0, bench.args.soak), SOAKING)], bench.work)  # memory of a warm one
            found["soak"] = soak(server, requests, bench.args.soak, bench.work)
    return found
