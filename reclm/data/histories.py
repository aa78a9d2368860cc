"""histories.npz in a run folder: who did what, to recommend without the raw data. Needs numpy alone."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reclm.data.cache import parts
from reclm.errors import UserError, first_line

if TYPE_CHECKING:  # it imports pandas
    from reclm.data.dataset import Dataset

FILE = "histories.npz"
AGAIN = "delete it, then evaluate the run once (main.py --eval_only=true) to write it again"
PREFIX = "code "  # of the names of codes in the file
SMALLER = {"item_ids": np.int32, "profiles": np.int16, "code": np.int16}  # than in Dataset, by the first word


class Histories:
    """All actions of all users, from every split, oldest first: user u owns rows offsets[u] : offsets[u + 1].

    users       (U,) original ids as text        item_ids   (rows,) int32 in 1..V-1
    offsets     (U + 1,) int64                   timestamps (rows,) float64 seconds; empty if unknown
    profiles    (U, P) int16 codes               codes      {name: (rows,) int16}, as in Dataset"""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.users, self.offsets = arrays["users"], arrays["offsets"]
        self.item_ids, self.timestamps = arrays["item_ids"], arrays["timestamps"]
        self.profiles = arrays["profiles"]
        self.codes = {
            name.removeprefix(PREFIX): codes for name, codes in arrays.items() if name.startswith(PREFIX)
        }

    def __len__(self) -> int:
        return len(self.users)

    def number(self, user: str) -> int:
        """The index of a user. Raises UserError for an id that is not in the data."""
        found = np.flatnonzero(self.users == user)
        if not len(found):
            example = f", such as {self.users[0]}" if len(self.users) else ""
            raise UserError(f"there is no user {user!r:.60}: use one of the {len(self):,} ids{example}")
        return int(found[0])


def write_histories(path: Path, dataset: "Dataset") -> None:
    """Write the file. Raises OSError if that fails."""
    order = slice(None)
    if len(dataset.labels) and len(dataset.timestamps):  # impressions are ordered by split first
        order = np.lexsort((dataset.timestamps, dataset.owner))
    arrays = {
        "users": dataset.users.astype(str),
        "offsets": dataset.offsets,
        "item_ids": dataset.item_ids[order],
        "timestamps": dataset.timestamps[order] if len(dataset.timestamps) else dataset.timestamps,
        "profiles": dataset.profiles if dataset.profile_sizes else dataset.profiles[:, :0],
    }
    arrays |= {PREFIX + name: codes[order] for name, codes in dataset.codes.items()}
    with zipfile.ZipFile(path, "w") as archive:  # as np.savez does, but with a part of an array at once
        for name, array in arrays.items():
            kind = np.dtype(SMALLER.get(name.split()[0], array.dtype))
            header = {"descr": kind.str, "fortran_order": False, "shape": array.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts(array):
                    file.write(part.astype(kind).tobytes())


def read_histories(path: Path) -> Histories:
    """Read the file. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing, which says what each user did: evaluate the run once (main.py "
            "--eval_only=true) to write it, or name the films of a person with --history"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            histories = Histories(dict(file))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated or foreign ({first_line(error)}): {AGAIN}") from None
    rows, users = len(histories.item_ids), len(histories.users)
    good = histories.offsets.shape == (users + 1,) and histories.profiles.shape[:1] == (users,)
    good = good and not (np.diff(histories.offsets, prepend=0, append=rows) < 0).any()
    good = good and histories.item_ids.min(initial=1) > 0
    good = good and all(len(codes) == rows for codes in histories.codes.values())
    if not good or len(histories.timestamps) not in (0, rows):
        raise UserError(f"{path} is damaged, its arrays disagree: {AGAIN}")
    return histories
