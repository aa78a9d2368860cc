"""Settings of this process in the operating system: memory allocation, signals, end with its launcher."""

import ctypes
import signal
from contextlib import suppress


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of large freed tensors instead of returning it to the system at each step:
    otherwise about half of a training step on a CPU is page faults."""
    with suppress(OSError, AttributeError):  # not glibc (macOS, Windows, musl): nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # as in malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def die_with_launcher() -> None:
    """Have this process killed when torchrun dies: an orphan would write into the folder of a resumed run."""
    with suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1  # as in prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class StopRequest:
    """True after SIGTERM or Ctrl-C, upon which the run ends its step, saves and exits. `signal` is its
    number.

    A second Ctrl-C raises KeyboardInterrupt at once, without saving."""

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
