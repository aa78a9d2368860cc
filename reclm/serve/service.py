"""What a server keeps between requests: the model in service, the calls that wait for it, sessions."""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from reclm.data.histories import Histories
from reclm.errors import UserError, one_line
from reclm.serve.catalogue import Filters
from reclm.serve.choose import load
from reclm.serve.person import Person
from reclm.serve.recommender import Recommender, Session

LONGEST_IN_LOOP = 0.01  # seconds of a pass up to which it runs in the event loop, see Line
POLL_SECONDS = 1.0

log = logging.getLogger("reclm.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    queue: int = 64  # calls of the model that wait
    max_sessions: int = 1000  # 0 = no sessions
    max_history: int = 1000  # actions of one person
    users: bool = True  # show the users of the training data


class Refused(Exception):
    """An answer without work on the request"""

    def __init__(self, status: int, text: str, headers: dict[str, str]):
        super().__init__(status, text)
        self.status, self.text, self.headers = status, text, headers


class Model:
    """A recommender in service, with its sessions; they end when another model takes its place."""

    def __init__(self, recommender: Recommender, limits: Limits, name: str = ""):
        """Reads and computes what would make the first requests slow. Raises UserError for a damaged
        histories.npz."""
        self.recommender, self.name = recommender, name
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        offered = limits.users and recommender.knows_users
        self.histories: Histories | None = recommender.histories if offered else None
        recommender.catalogue.search("")
        self.in_thread = pass_seconds(recommender) > LONGEST_IN_LOOP

    def open_session(self, session: Session, most: int) -> str:
        """Keep a session -> its id, which nobody can guess. The least recently used one of more than `most`
        ends."""
        key = secrets.token_urlsafe(16)
        self.sessions[key] = session
        while len(self.sessions) > most:
            self.sessions.popitem(last=False)
        return key


def pass_seconds(recommender: Recommender) -> float:
    """Seconds of recommending to a person with a history of full length, the fastest of five"""
    items = np.arange(recommender.reads.max_len) % len(recommender.catalogue) + 1
    person, seconds = Person(items, user=0), []
    for _ in range(5):
        begin = time.perf_counter()
        recommender.recommend(person, 1, Filters(include_seen=True))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Line:
    """Calls of the model in the order of arrival. Those of about a millisecond run in the event loop, which
    is faster than the way to a thread and back. Longer ones run in the one thread of the model while the loop
    goes on."""

    def __init__(self, most: int):
        self.most, self.length = most, 0
        self.waiting: deque[tuple[Callable[[], Any], asyncio.Future]] = deque()  # for the loop
        self.thread = ThreadPoolExecutor(1, "model")

    def check(self) -> None:
        """Raises Refused if the line is full."""
        if self.length >= self.most:
            raise Refused(429, "too many requests wait: try again", {"Retry-After": "1"})

    async def call(self, function: Callable[[], T], in_thread: bool = True) -> T:
        """The result of `function()`. Raises Refused if the line is full."""
        self.check()
        loop = asyncio.get_running_loop()
        self.length += 1
        try:
            if in_thread:
                return await loop.run_in_executor(self.thread, function)
            future = loop.create_future()
            self.waiting.append((function, future))
            if len(self.waiting) == 1:
                loop.call_soon(self.serve, loop)
            return await future
        finally:
            self.length -= 1

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """The first call that waits. The loop sends answers and reads requests before the next one."""
        function, future = self.waiting.popleft()
        if not future.cancelled():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        if self.waiting:
            loop.call_soon(self.serve, loop)


class Source:
    """Where the model in service comes from, a checkpoint file or an exported folder; and its adapters"""

    def __init__(
        self,
        path: Path,
        titles: Path | None = None,
        quantize: str = "none",
        adapters: Sequence[Path] = (),
    ):
        self.path, self.titles, self.quantize, self.adapters = path, titles, quantize, adapters
        self.loaded = None

    def stamp(self) -> list[tuple] | None:
        """What differs once a file, or one of the folder, has been replaced; None while it is missing"""
        try:
            files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path, *self.adapters]
            stats = [(file, file.stat()) for file in files]
        except OSError:
            return None
        return [(file.name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in stats]

    def load(self, limits: Limits) -> Model:
        """Raises UserError, as Recommender.load does."""
        self.loaded = self.stamp()  # before the reading: a file that changes meanwhile is read again
        model = load(self.path, self.titles, self.quantize, self.adapters)
        return Model(model, limits, self.path.name)


class Service:
    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits = model, limits
        self.line, self.stopping, self.loads = Line(limits.queue), False, 1

    async def watch(self, source: Source) -> None:
        """Replace the model when its file has been; requests in flight end with the old one. A file that
        cannot take its place is one line in the log."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if source.stamp() in (None, source.loaded):
                continue
            try:
                model = await asyncio.to_thread(source.load, self.limits)
                check_same_kind(model.recommender, self.model.recommender)
            except Exception as error:  # whatever it is, the server goes on
                log.error("%s", one_line(f"not loaded, the model before it stays in service: {error}"))
                continue
            self.model = model
            self.loads += 1
            log.info("%s", one_line(f"loaded {model.name}: {model.recommender.about.trained}"))


def check_same_kind(new: Recommender, old: Recommender) -> None:
    """Raises UserError for a model of other data or another task: that is a mistake rather than an update."""
    for what, theirs, ours in (
        ("--dataset", new.about.dataset, old.about.dataset),
        ("--task", new.about.config["task"], old.about.config["task"]),
    ):
        if theirs != ours:
            raise UserError(f"it is of {what}={theirs}, the model in service of {what}={ours}")
