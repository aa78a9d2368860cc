"""reclm/run/checkpoint.py: what is refused when a file is read."""

import pytest
import torch

from reclm.errors import UserError
from reclm.run.checkpoint import VERSION, load_checkpoint


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION])
def test_another_versions_weights_are_refused(tmp_path, version):
    """Since version 2 channels are rotated in other pairs: older weights would mean another model."""
    names = ("model", "optimizer", "progress", "history", "config", "dataset", "fingerprint")
    state = dict.fromkeys(names, {}) | ({"version": version} if version else {})
    path = tmp_path / "last.pth"
    torch.save(state, path)
    if version == VERSION:
        assert load_checkpoint(path) == state
        return
    with pytest.raises(UserError, match="another version"):
        load_checkpoint(path)
