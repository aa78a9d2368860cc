"""Processes: one rank or many, the same lines. The only module that knows what a process group is."""

import atexit
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reclm.errors import UserError

# The process group, held until nothing else is. DDP holds it too, and as its last owner would free it with
# the GIL taken, while gloo's threads, which must finish first, may wait for the GIL to let go of the last
# barrier: 3 of 36 stopped runs hung at their exit. Freed by Python, it is without the GIL.
_group = None


@atexit.register
def free_group() -> None:
    """No later than this: a thread that asks for the GIL while the interpreter goes away aborts the process,
    the most likely cause of a run that once ended so ("terminate called without an active exception")."""
    global _group
    if getattr(sys, "last_value", None) is None:  # else a traceback holds the frames of the run, and so DDP
        gc.collect()  # DDP is part of cycles
        _group = None


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


@contextmanager
def distributed():
    """The process group of a torchrun launch, or nothing in a plain `python main.py`.

    A UserError (or an OSError such as a full disk) becomes one line and exit code 2. It is raised by
    all ranks alike (see `on_main`), so one of them speaks for all.
    """
    keep_freed_memory()
    try:
        if world_size() > 1:
            die_with_launcher()
            cuda = torch.cuda.is_available()
            if cuda and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # gloo stays beside nccl: small sums over ranks live on the CPU. A long timeout, since a
            # rank may wait for another one to download and prepare the data.
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
            global _group
            _group = dist.group.WORLD
        yield
        barrier()  # without it gloo aborts one run in a hundred at interpreter exit
    except (UserError, OSError) as error:
        if is_main():
            sys.stdout.flush()
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # torchrun ends all ranks when the first one exits: let that be the one that speaks
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(30)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before the run had anything to save
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed tensors instead of returning them to the system at each step:
    without this about half of a CPU training step is page faults."""
    with suppress(OSError, AttributeError):  # not glibc (macOS, Windows, musl): nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def die_with_launcher() -> None:
    """End when torchrun is killed: orphaned ranks would train on, and write beside a resumed run."""
    with suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1  # from prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> this rank's device. Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU here; use --device=cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world > gpus:
        raise UserError(
            f"{local_world} ranks on this machine, but it has {gpus} GPU(s): "
            f"use --nproc_per_node={gpus} or --device=cpu"
        )
    return torch.device("cuda", local)


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP over all ranks; the model itself where there is only one."""
    if not dist.is_initialized():
        return model
    # Buffers are the same on all ranks from the start.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def sum_over_ranks(values: list[float]) -> list[float]:
    """Each of the values summed over all ranks, in float64: exact for counts."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def gather_from_ranks(value) -> list:
    """[value of rank 0, value of rank 1, ...] on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable):
    """Run `function` on the main rank only and return its result, or raise its error, on every rank."""
    result, failure = None, None
    if is_main():
        try:
            result = function()
        except (UserError, OSError) as error:
            failure = UserError(str(error))
    if dist.is_initialized():
        shared = [result, failure]
        dist.broadcast_object_list(shared)
        result, failure = shared
    if failure:
        raise failure
    return result


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class StopRequest:
    """True once SIGTERM or Ctrl-C has come: the run then saves at the next step and ends.

    A second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None
