"""--describe: what was understood of the data, before anything is trained."""

import os
import sys
import time

import numpy as np
import torch

from reclm.data.dataset import Dataset

BINS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # shortest history of each bar
SESSION = 3600  # seconds without an action after which the next one starts a session
WIDTH = 40  # characters of the longest bar


def describe_histories(dataset: Dataset) -> str:
    """Lines on times, sessions, repeats and lengths of the histories, with a histogram of their lengths."""
    lengths, rows = dataset.lengths, len(dataset.item_ids)
    lines = [
        f"per user: {lengths.min()} to {lengths.max():,} actions, median {np.median(lengths):g}, "
        f"mean {lengths.mean():.1f}",
        f"per item: {rows / dataset.num_items:.1f} actions on average; the most frequent 1 % of the items "
        f"take {share_of_top(dataset):.0%} of the actions",
        f"repeats: {count_repeats(dataset) / rows:.1%} of the actions are on an item the user had before",
    ]
    if len(dataset.timestamps):
        lines += describe_times(dataset)
    if len(dataset.ratings):
        values = np.unique(dataset.ratings)
        what = ", ".join(f"{value:g}" for value in values) if len(values) <= 12 else f"{len(values):,} values"
        lines.append(f"ratings: {what}; mean {dataset.ratings.mean():.2f}")
    return "\n".join([*lines, "users by their number of actions:", *histogram(lengths)])


def share_of_top(dataset: Dataset) -> float:
    counts = np.sort(np.bincount(dataset.item_ids))[::-1]
    return counts[: max(1, dataset.num_items // 100)].sum() / len(dataset.item_ids)


def count_repeats(dataset: Dataset) -> int:
    """Number of actions on an item that the same user had before."""
    pairs = dataset.owner * (dataset.num_items + 1) + dataset.item_ids
    return len(pairs) - len(np.unique(pairs))


def describe_times(dataset: Dataset) -> list[str]:
    times = dataset.timestamps
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in (times.min(), times.max()))
    gaps = np.diff(times)
    same_user = np.diff(dataset.owner) == 0
    sessions = dataset.num_users + int((gaps[same_user] > SESSION).sum())
    ties = (gaps[same_user] == 0).mean() if same_user.any() else 0.0
    return [
        f"times: {first} to {last} UTC; {ties:.1%} of the actions have the time of the one before",
        f"sessions: {sessions:,}, a new one after an hour without actions; "
        f"{len(times) / sessions:.1f} actions each",
    ]


def histogram(lengths: np.ndarray) -> list[str]:
    """One line per bin that is not empty: "   10-19      120  ########"."""
    place = np.searchsorted(BINS, lengths, side="right") - 1
    counts = np.bincount(place[place >= 0], minlength=len(BINS))
    lines = []
    for i, count in enumerate(counts):
        end = BINS[i + 1] - 1 if i + 1 < len(BINS) else None
        name = f"{BINS[i]}+" if end is None else f"{BINS[i]}-{end}" if end > BINS[i] else f"{end}"
        if count:
            lines.append(f"  {name:>9} {count:>11,}  {'#' * max(1, round(WIDTH * count / counts.max()))}")
    return lines


def describe_cost(seconds: list[float], num_steps: int, num_epochs: int) -> str:
    """What a run takes: measured `seconds` of some steps, and the memory of this process so far."""
    step = float(np.median(seconds))
    return (
        f"to expect: {1000 * step:.0f} ms per step, {in_words(step * num_steps)} per epoch of {num_steps:,} "
        "steps, "
        f"{in_words(step * num_steps * num_epochs)} for all {num_epochs} epochs (validation not included), "
        f"{memory() / 2**30:.1f} GiB per process"
    )


def in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def memory() -> int:
    """Bytes: the peak of this process, on a GPU that of the GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
