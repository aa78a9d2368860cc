"""Our split of a block against the layers of megatron-core, on two processes."""

import pytest
from launch import MAIN, torchrun

PROGRAM = f"""
import sys
sys.path.insert(0, {str(MAIN.parent)!r})
from copy import deepcopy
import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from model import SequenceRecommender
from reclm.config import build_config
from reclm.data.dataset import Vocabulary
from reclm.run import dist
from reclm.run.engines import lay_out

with dist.distributed():
    cfg = build_config({{"parallel": "tp", "device": "cpu", "n_heads": 4, "n_kv_heads": 2, "dropout": 0.0}})
    layout = lay_out(cfg)
    torch.manual_seed(0)
    model = SequenceRecommender(cfg.model, cfg.loss, Vocabulary(50, 5))
    whole = deepcopy(model.layers[0])
    layout.place(model)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
    config.gradient_accumulation_fusion, config.perform_initialization = False, False

    def column(weight):
        layer = ColumnParallelLinear(*weight.T.shape, config=config, init_method=None, bias=False)
        layer.weight.data.copy_(weight.chunk(2)[dist.rank()])
        return lambda x: layer(x)[0]

    def row(weight):
        layer = RowParallelLinear(*weight.T.shape, config=config, init_method=None, bias=False,
                                  input_is_parallel=True, skip_bias_add=False)
        layer.weight.data.copy_(weight.chunk(2, dim=1)[dist.rank()])
        return lambda x: layer(x)[0]

    theirs = deepcopy(whole)  # our code, with their layers
    layers = {{theirs.attention: ("wq", "wk", "wv", "wo"), theirs.feed_forward: ("w1", "w3", "w2")}}
    for part, names in layers.items():
        for name in names:
            weight = getattr(part, name).weight.detach()
            delattr(part, name)
            object.__setattr__(part, name, (row if name in ("wo", "w2") else column)(weight))
    ids = {{"token_ids": torch.ones(2, 7, dtype=torch.long)}}
    found = []
    for block in (whole, model.layers[0], theirs):
        torch.manual_seed(1)
        x = torch.randn(2, 7, cfg.model.dim, requires_grad=True)
        y = block(x, model.context(ids))
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    for other in found[1:]:
        for ours, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-5)
    print("alike", dist.rank())
"""


def test_a_block_is_split_as_megatron_does(tmp_path):
    pytest.importorskip("megatron.core", reason="pip install megatron-core==0.16.1")
    (tmp_path / "program.py").write_text(PROGRAM)
    shown = torchrun(2, cwd=tmp_path, program=tmp_path / "program.py").ok()
    assert shown.stdout.count("alike") == 2
