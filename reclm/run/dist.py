"""Processes: one or many, the same lines. The only module that knows what a process group is.

A process's share of the data, `data_rank` of `data_world`, is kept apart from which process it is: where the
tensors of a model are sharded over some processes, these read the same batches."""

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reclm.errors import UserError
from reclm.run.process import die_with_launcher, keep_freed_memory

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


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def data_rank() -> int:
    """Which share of the data this process reads, from 0."""
    return rank()


def data_world() -> int:
    """How many shares there are."""
    return num_processes()


def is_main() -> bool:
    return rank() == 0


@contextmanager
def distributed():
    """The process group of a torchrun launch, or nothing in a plain `python main.py`.

    A UserError (or an OSError such as a full disk) becomes one line and exit code 2. It is raised by
    all processes alike (see `on_main`), so one of them speaks for all.
    """
    keep_freed_memory()
    try:
        if num_processes() > 1:
            die_with_launcher()
            cuda = torch.cuda.is_available()
            if cuda and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # gloo stays beside nccl: small sums live on the CPU. A long timeout, since a
            # process may wait for another one to download and prepare the data.
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
        else:  # torchrun ends all processes when the first one exits: let that be the one that speaks
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(30)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before the run had anything to save
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> this process's device. Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU here; use --device=cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world > gpus:
        raise UserError(
            f"{local_world} processes on this machine, but it has {gpus} GPU(s): "
            f"use --nproc_per_node={gpus} or --device=cpu"
        )
    return torch.device("cuda", local)


def data_parallel(model: nn.Module) -> nn.Module:
    """DDP over all processes; the model itself where there is only one."""
    if not dist.is_initialized():
        return model
    # Buffers are the same in all processes from the start.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def sum_over_processes(values: list[float]) -> list[float]:
    """Each of the values summed over all processes, in float64: exact for counts."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def gather_from_processes(value) -> list:
    """[value of process 0, of process 1, ...] in every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable):
    """Run `function` in the main process only and return its result, or raise its error, in every one."""
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
