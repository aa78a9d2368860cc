"""What this process asks of the operating system: memory, signals, its end."""

import ctypes
import signal
from contextlib import suppress


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed tensors instead of returning them to the system at each step:
    without this about half of a CPU training step is page faults."""
    with suppress(OSError, AttributeError):  # not glibc (macOS, Windows, musl): nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def die_with_launcher() -> None:
    """End when torchrun is killed: orphaned processes would train on, and write while a resumed run does."""
    with suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1  # from prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class StopRequest:
    """True once SIGTERM or Ctrl-C has come: the run then saves at the next step and ends.

    A second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None
