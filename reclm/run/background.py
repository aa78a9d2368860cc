"""--save_every: write a checkpoint while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Background:
    """One thread that writes, one file after the other. It ends with the program, not before its file."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def run(self, write: Callable[[dict], None], state: dict, wait: bool) -> None:
        """Call `write(state)`; without `wait` in the thread, with a copy of the state. Waits for the call
        before and raises what it raised."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()
        if wait:
            write(state)
        else:
            self.pending = self.thread.submit(write, copied(state))


def copied(state):
    """Nested dicts and lists with copies of their tensors in main memory, which training does not change."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state
