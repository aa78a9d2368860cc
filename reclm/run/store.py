"""The key-value store of a launch: where processes meet, also after a restart, and where they learn whether
the main process, for which they wait, is still at work."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from reclm.errors import LocalError
from reclm.run.process import StopRequest

NOT_SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # makes torchrun use a new store for each attempt
BEAT = 1  # seconds between two signs of life of the main process
SILENCE = 60  # seconds without one after which it counts as lost,
TOLD_TO_STOP = 5  # and where this process is told to stop, as torchrun does when another has died


def find_store(timeout: timedelta) -> Store:
    """The store that torchrun or the main process serves. Raises RuntimeError or ValueError if it cannot be
    reached."""
    store, *_ = next(rendezvous("env://", timeout=timeout))
    # torchrun restarts workers with the store that they had before: without a part of its own, an attempt
    # would read the addresses of the one before and wait for processes that are gone. Agents on several hosts
    # count attempts each for itself.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return PrefixStore(f"attempt {restarts()}", store)
    if restarts() and os.environ.get(NOT_SHARED) != "1":
        print(
            f"NOTE: restarted without {NOT_SHARED}=1 where torchrun was launched: this may hang", flush=True
        )
    return store


def restarts() -> int:
    """How often torchrun has restarted this process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class AtWork:
    """Waiting for the main process, or that of a host, however long it takes, but not for one that is gone.
    The n-th `work` there ends the n-th `wait` of the others that share the store."""

    def __init__(self, store: Store):
        self.store, self.count = store, 0

    @contextmanager
    def work(self) -> Iterator[None]:
        """In the main process: give signs of life inside the block."""
        self.count += 1
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT):
                self.store.add("beats", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.store.set(f"work {self.count}", "done")

    def end(self) -> None:
        """In the main process: it has printed its error and is about to exit."""
        with suppress(RuntimeError):
            self.store.set("end", "")

    def wait_for_end(self) -> None:
        """In the others"""
        with suppress(RuntimeError):
            self.store.wait(["end"], timedelta(seconds=30))

    def wait(self) -> None:
        """In the others. Raises LocalError if the main process is silent for SILENCE seconds, or the store is
        gone."""
        self.count += 1
        beats, heard = 0, time.monotonic()
        while time.monotonic() - heard < (TOLD_TO_STOP if StopRequest.latest else SILENCE):
            try:
                return self.store.wait([f"work {self.count}"], timedelta(seconds=BEAT))
            except DistStoreError:  # not yet
                now = self.store.add("beats", 0)
                if now != beats:
                    beats, heard = now, time.monotonic()
            except RuntimeError as error:
                raise LocalError(
                    f"the store of this launch is gone ({error}): see its other messages"
                ) from None
        raise LocalError("process 0 gave no sign of life for a while: see its messages, then resume")
