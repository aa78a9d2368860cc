"""One run per folder. The operating system drops the lock of a process that dies; a file with a heartbeat
protects the folder from processes on other machines, where that lock may not be seen."""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from reclm.errors import UserError
from reclm.run.output import writing

LOCK, OWNER = ".lock", ".owner"  # files in the folder of a run
HEARTBEAT = 15.0  # seconds
STALE = 120.0  # seconds without a heartbeat after which an owner on another machine counts as dead


class FolderLock:
    """Held from construction to `release`. Raises UserError, naming its process and machine, if another
    process holds it."""

    def __init__(self, folder: Path):
        self.owner = folder / OWNER
        self.lock = FileLock(folder / LOCK)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(self.refusal(folder)) from None
        except (OSError, NotImplementedError):  # a file system without locks: the heartbeat has to do
            pass
        if self.is_alive_elsewhere():
            self.lock.release()
            raise UserError(self.refusal(folder))
        with writing(self.owner):
            self.owner.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        self.ended = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        while not self.ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self.owner)

    def read_owner(self) -> dict:
        """{"process": ..., "host": ...} of the file, or {} where it is missing or damaged."""
        try:
            found = json.loads(self.owner.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def is_alive_elsewhere(self) -> bool:
        host = self.read_owner().get("host", socket.gethostname())
        with suppress(OSError):
            return host != socket.gethostname() and time.time() - self.owner.stat().st_mtime < STALE
        return False

    def refusal(self, folder: Path) -> str:
        found = self.read_owner()
        owner = f"process {found.get('process', 'unknown')} on {found.get('host', 'this machine')}"
        return f"{folder} is in use by a run, {owner}: wait for it, stop it, or use another --out_dir"

    def release(self) -> None:
        self.ended.set()
        for path in (self.owner, Path(self.lock.lock_file)):
            path.unlink(missing_ok=True)
        self.lock.release()
