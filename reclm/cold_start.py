"""Cold start: how well items are ranked that training has never seen."""

import numpy as np

from reclm.errors import UserError


def hold_out(arrays: dict[str, np.ndarray], share: float) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of `sequences.build_sequences` -> the same without a random `share` of the items, and a note.

    What is left of a user: all actions with other items up to the last action with one of these, and that
    one, which is the test target. So training and validation never see them, and every user's test target is
    one. Users without such an action, or with fewer than two before it, are left out. Raises UserError."""
    num_items = len(arrays["items"])
    count = round(share * num_items)
    cold_items = np.sort(np.random.default_rng(0).choice(num_items, count, replace=False)) + 1
    offsets, item_ids = arrays["offsets"], arrays["item_ids"]
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    cold = np.isin(item_ids, cold_items)
    last = np.full(len(offsets) - 1, -1)
    np.maximum.at(last, owner[cold], np.flatnonzero(cold))  # row of each user's last action with one
    row = np.arange(len(item_ids))
    kept = (~cold & (row < last[owner])) | (row == last[owner])
    lengths = np.bincount(owner[kept], minlength=len(last))
    users = lengths >= 3
    if not users.any():
        raise UserError(
            f"--cold_items={share} holds out {count:,} items, and no user has one of them after two others: "
            "too little data, or too small a share"
        )
    kept &= users[owner]
    by_row = {name: arrays[name][kept] for name in ("item_ids", "timestamps", "ratings") if len(arrays[name])}
    note = (
        f"cold start (--cold_items={share}): {count:,} items are kept out of training; the test item is each "
        f"user's last one of them, ranked among all ({(~users).sum():,} users without one are left out)"
    )
    return arrays | by_row | {
        "offsets": np.concatenate([[0], np.cumsum(lengths[users])]),
        "users": arrays["users"][users],
        "cold_items": cold_items,
    }, note  # fmt: skip
