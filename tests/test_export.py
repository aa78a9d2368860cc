"""torch.export of the model: item ids and lengths in, scores of all items out, for any batch and length."""

import pytest
import torch
from torch import Tensor, nn

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary

MAX_LEN = 20


class Scores(nn.Module):
    """The model with plain arguments in place of a batch."""

    def __init__(self, model: SequenceRecommender):
        super().__init__()
        self.model = model

    def forward(self, item_ids: Tensor, lengths: Tensor, timestamps: Tensor) -> Tensor:
        batch = {"item_ids": item_ids, "lengths": lengths, "num_before": torch.zeros_like(lengths)}
        batch |= {"timestamps": timestamps, "next_timestamps": timestamps}
        hidden = self.model.encode(batch, last_only=True)[:, 0]
        return hidden @ self.model.item_table().T


def example(batch, length):
    rng = torch.Generator().manual_seed(batch * 100 + length)
    times = torch.randint(0, 10**5, (batch, length), generator=rng).double().cumsum(1)
    lengths = torch.randint(1, length + 1, (batch,), generator=rng)
    item_ids = torch.randint(1, 40, (batch, length), generator=rng)
    return item_ids * (torch.arange(length) < lengths[:, None]), lengths, times


@pytest.mark.parametrize(
    "settings",
    [
        {"n_kv_heads": 1, "gated_residuals": True, "position_embedding": True},
        {"window": 7, "time_tokens": "embedding"},
        {"model_name": "hstu"},
    ],
    ids=["llama", "window", "hstu"],
)
def test_an_exported_model_gives_the_same_scores_for_any_batch_and_length(settings):
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, max_len=MAX_LEN, **settings)
    model = Scores(SequenceRecommender(cfg, LossConfig(), Vocabulary(39, 5)).eval())
    batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = ({0: batch, 1: length}, {0: batch}, {0: batch, 1: length})
    with torch.no_grad():
        exported = torch.export.export(model, example(3, 12), dynamic_shapes=shapes).module()
        for size in ((1, 1), (2, MAX_LEN), (7, 9)):
            inputs = example(*size)
            torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
