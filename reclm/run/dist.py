"""Communication between processes, written so that callers need not know whether there is one or many.

Which share of the data a process reads (`data_rank` of `data_world`) is separate from its rank: processes
that hold parts of the same layers read the same batches (reclm/run/parallel.py). Sums and lists are over
shares, each of which counts once."""

import atexit
import gc
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reclm.errors import LocalError, UserError, first_line, open_streams, print_error
from reclm.run.process import die_with_launcher, keep_freed_memory
from reclm.run.store import AtWork, find_store

# A reference that keeps the process group alive until free_group(). If DDP were its last owner, it would free
# the group while holding the GIL, and wait for gloo's threads, which may need the GIL to finish the last
# barrier: 3 of 36 stopped runs hung at exit. Python releases the GIL when it frees the group itself.
_group = None
_main: AtWork | None = None
_host: AtWork | None = None
_readers = 1  # processes in a row that read the same share of the data
ROOT = Path(__file__).parents[2]
TIMEOUT = timedelta(minutes=10)  # for all processes to come, and to answer in a collective


@atexit.register
def free_group() -> None:
    """Free the process group before the interpreter shuts down: a thread that requests the GIL during
    shutdown aborts the process, the likely cause of one "terminate called without an active exception"."""
    global _group
    if getattr(sys, "last_value", None) is None:  # else a traceback keeps the frames of the run, and so DDP
        gc.collect()  # DDP is part of reference cycles
        _group = None


def rank() -> int:
    """The index of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def data_rank() -> int:
    """The index of the share of the data that this process reads, from 0."""
    return rank() // _readers


def data_world() -> int:
    """The number of shares of the data."""
    return num_processes() // _readers


@contextmanager
def readers_per_share(number: int) -> Iterator[None]:
    """Within the block, let `number` processes in a row, which must divide all, read the same data."""
    before = _readers
    read_alike(number)
    try:
        yield
    finally:
        read_alike(before)


def read_alike(number: int) -> None:
    """From now on, let `number` processes in a row read the same data."""
    global _readers
    _readers = number


def is_main() -> bool:
    return rank() == 0


@contextmanager
def distributed():
    """Context manager that sets up the process group of a torchrun launch; a no-op without torchrun.

    A UserError, or an OSError such as a full disk, becomes one line on stderr and exit code 2. All processes
    raise it (see `on_main`), and the main process prints it for all.
    """
    keep_freed_memory()
    open_streams()
    try:
        check_environment()
        if num_processes() > 1:
            die_with_launcher()
            cuda = torch.cuda.is_available()
            if cuda and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # gloo as well as nccl, since sums of metrics are taken on the CPU.
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            try:
                join(backend)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"cannot join {num_processes()} processes at {os.environ['MASTER_ADDR']}:"
                    f"{os.environ['MASTER_PORT']} ({first_line(error)}): launch them with torchrun"
                ) from None
            check_alike("code", hash_of_code())
        try:
            yield
        except SystemExit:  # --help: not all of it may have been written
            sys.stdout.flush()
            raise
        barrier()  # without it gloo aborts one run in a hundred at interpreter exit
    except (UserError, OSError) as error:
        if isinstance(error, LocalError) or is_main():
            print_error(error)
        else:  # torchrun kills all processes when the first one exits: let the main one print and exit first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _main.wait_for_end() if _main else time.sleep(30)
        if _main and is_main():
            _main.end()
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before training started, or a second Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def hash_of_code() -> str:
    """Hash of the spine and the package"""
    files, digest = sorted([*ROOT.glob("*.py"), *ROOT.glob("reclm/**/*.py")]), hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def join(backend: str) -> None:
    """Set up the process group of this launch. Raises RuntimeError or ValueError if some do not come."""
    global _group, _main, _host
    store = find_store(TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=num_processes(), timeout=TIMEOUT)
    _group, _main = dist.group.WORLD, AtWork(store)
    _host = AtWork(dist.PrefixStore(f"host {os.environ.get('GROUP_RANK', 0)}", store))


def check_environment() -> None:
    """Raises LocalError unless the variables of a launch by torchrun are all set and fit, or none is."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    there = {name: os.environ[name] for name in names if name in os.environ}
    if not there.keys() & {"RANK", "WORLD_SIZE"}:
        return
    missing = [name for name in names if name not in there]
    if missing:
        raise LocalError(
            f"{', '.join(there)} without {', '.join(missing)}: launch with torchrun, or unset them"
        )
    numbers = {name: there[name] for name in names if name != "MASTER_ADDR"}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise LocalError(f"{name}={value} is not a number: launch with torchrun, or unset it")
    if not int(there["RANK"]) < int(there["WORLD_SIZE"]):
        raise LocalError(f"RANK={there['RANK']} must be below WORLD_SIZE={there['WORLD_SIZE']}: use torchrun")


def pick_device(name: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda". Raises UserError if GPUs are requested but
    missing, or fewer than the processes of this machine."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch finds no GPU: use --device=cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world > gpus:
        raise UserError(
            f"{local_world} processes on this machine, but it has {gpus} GPU(s): "
            f"use --nproc_per_node={gpus} or --device=cpu"
        )
    return torch.device("cuda", local)


def data_parallel(model: nn.Module, others: Sequence[str] = ()) -> nn.Module:
    """The model wrapped in DDP, or the model itself in a run of one process. `others` are names of weights
    that are not copies."""
    if not dist.is_initialized():
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    # Buffers are constants, equal in all processes, so they are not synchronised.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def sum_over_processes(values: list[float]) -> list[float]:
    """Each value summed over all shares of the data, in float64, which is exact for counts."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return (tensor / _readers).tolist()


def average_over_processes(tensor: torch.Tensor) -> None:
    """Replace the tensor by its mean over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor.div_(num_processes())


def gather_from_processes(value) -> list:
    """The list of the values of one process per share of the data, in every process; they are picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values[::_readers]


def on_main(function: Callable):
    """Call `function()` in the main process and return its result in every process. A UserError or OSError is
    raised as a UserError in every process, so that none waits for another that has failed."""
    result, failure = attempt(function, _main, is_main())
    if dist.is_initialized():
        shared = [result, failure]
        dist.broadcast_object_list(shared)
        result, failure = shared
    if failure:
        raise failure
    return result


def from_main(function: Callable):
    """`on_main` for results with large tensors, which are sent one by one."""
    kept = []

    def without_tensors():
        return replace_tensors(function(), lambda x: kept.append(x.contiguous()) or x.to("meta"))

    def received(meta: torch.Tensor) -> torch.Tensor:
        tensor = kept.pop(0) if kept else torch.empty_like(meta, device="cpu")
        dist.broadcast(tensor, 0)
        return tensor

    return replace_tensors(on_main(without_tensors), received) if dist.is_initialized() else function()


def replace_tensors(value, function: Callable):
    """The same dicts, lists and tuples with function(tensor) in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: replace_tensors(part, function) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replace_tensors(part, function) for part in value)
    return value


def on_each_host(function: Callable):
    """`on_main` of each host, for what it needs on its own disk: the result there, in each of its
    processes."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    found = attempt(function, _host, local == 0)
    if dist.is_initialized():
        everywhere = [None] * num_processes()
        dist.all_gather_object(everywhere, found)
        failures = [failure for _, failure in everywhere if failure]
        found = everywhere[rank() - local][0], failures[0] if failures else None
    result, failure = found
    if failure:
        raise failure
    return result


def attempt(function: Callable, clock: AtWork | None, here: bool) -> tuple:
    """(the result of `function()`, the UserError to raise), if it is to be called `here`. Other processes
    wait and get (None, None)."""
    if not here:
        if clock:
            clock.wait()
        return None, None
    with clock.work() if clock else nullcontext():
        try:
            return function(), None
        except (UserError, OSError) as error:
            return None, UserError(str(error))


def check_alike(what: str, value: str) -> None:
    """Raise UserError unless all processes have the same value."""
    if dist.is_initialized():
        values = [None] * num_processes()
        dist.all_gather_object(values, (value, socket.gethostname()))
        for process, (theirs, host) in enumerate(values):
            if theirs != values[0][0]:
                raise UserError(f"process {process} on {host} has other {what} than process 0: use one")


def barrier() -> None:
    """Wait until all processes have called this."""
    if dist.is_initialized():
        dist.barrier()
