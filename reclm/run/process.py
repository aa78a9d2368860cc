"""Settings of this process in the operating system: memory allocation, signals, end with its launcher."""

import ctypes
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from reclm.config import Config
from reclm.data.dataset import Vocabulary
from reclm.errors import LocalError, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # as in malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of large freed tensors instead of returning it to the system at each step:
    otherwise about half of a training step on a CPU is page faults."""
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


@contextmanager
def return_large_tensors() -> Iterator[None]:
    """Within the block, return those of 4 MiB and more. In an evaluation small results stay between large
    tensors of scores, so freed memory would not be large enough for the next: a ranking of a million items
    took more with every batch."""
    set_malloc({M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**22})
    yield
    set_malloc({M_MMAP_MAX: 0})


def set_malloc(values: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):  # not glibc (macOS, Windows, musl): nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in values.items():
            mallopt(name, value)


def die_with_launcher() -> None:
    """Have this process killed when torchrun dies: an orphan would write into the folder of a resumed run."""
    with suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1  # as in prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def check_memory(cfg: Config, vocabulary: Vocabulary) -> None:
    """Raises UserError if the weights of the model and what a training step holds at least cannot fit into
    the memory of this machine: better now than in the middle of building it."""
    model = cfg.model
    block = model.dim * (5 * model.dim if model.model_name == "hstu" else 2 * model.dim + 3 * model.ffn_dim)
    vector = model.pq_codes if model.item_table == "pq" else 4 * model.dim
    rows = vocabulary.num_items + 1 + (vocabulary.num_users if model.user_embedding == "explicit" else 0)
    parts = {  # bytes, and the settings they grow with
        "dim, n_layers, hidden_dim": rows * vector + 4 * model.n_layers * block,
        "max_len": 4 * model.max_len * model.head_dim,
    }
    if model.task == "matching":
        sequences = min(cfg.train.batch_size, vocabulary.num_users)
        parts["num_negatives, batch_size"] = 4 * sequences * cfg.loss.num_negatives
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    names, most = max(parts.items(), key=lambda part: part[1])
    if sum(parts.values()) > memory:
        raise UserError(
            f"this model needs at least {sum(parts.values()) / 2**30:,.0f} GiB of memory, "
            f"{most / 2**30:,.0f} GiB due to {names}, but this machine has {memory / 2**30:,.0f}: choose "
            "smaller values"
        )


@contextmanager
def memory_of_step(epoch: int, step: int, micro_batches: list[dict]) -> Iterator[None]:
    """Turn the errors of torch for a lack of memory into a UserError that names the step, its size and the
    settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        size = " x ".join(map(str, next(iter(micro_batches))["item_ids"].shape))
        raise LocalError(
            f"out of memory at epoch {epoch}, step {step}, micro-batches of {size} actions: use a smaller "
            "--batch_size, --max_len or --num_negatives, or a larger --grad_accum_steps"
        ) from None


class StopRequest:
    """True after SIGTERM or Ctrl-C, upon which the run ends its step, saves and exits. `signal` is its
    number.

    A second Ctrl-C raises KeyboardInterrupt at once, without saving."""

    latest: "StopRequest | None" = None

    def __init__(self):
        self.signal, StopRequest.latest = None, self
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None
