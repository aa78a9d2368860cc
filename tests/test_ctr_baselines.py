"""scripts/ctr_baselines.py: the logit of the regression by hand, the actions DIN attends to, and runs."""

import sys

import numpy as np
import pytest
import torch
from launch import MAIN, TINY, here, read_json, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts"))
import ctr_baselines

from reclm.config import LossConfig, ModelConfig
from reclm.data.dataset import Vocabulary

FEATURES = {
    "genres": np.array([[1, 2], [2, 0], [1, 0], [0, 0], [3, 1]]),
    "image": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
}
VOCABULARY = Vocabulary(5, 4, (3, 2), {"actions": 5, "contexts": 2}, FEATURES)


def made_up_batch():
    """2 users with 4 and 2 actions, and 3 and 2 candidates after parts of them."""
    return {
        "item_ids": torch.tensor([[1, 2, 3, 4], [5, 1, 0, 0]]),
        "actions": torch.tensor([[5, 1, 3, 2], [4, 4, 0, 0]]),
        "contexts": torch.tensor([[1, 2, 2, 1], [2, 1, 0, 0]]),
        "lengths": torch.tensor([4, 2]),
        "user_ids": torch.tensor([3, 0]),
        "profiles": torch.tensor([[2, 1], [1, 0]]),
        "candidate_ids": torch.tensor([[3, 4, 5], [1, 5, 0]]),
        "candidate_contexts": torch.tensor([[2, 1, 1], [1, 2, 0]]),
        "history_lengths": torch.tensor([[0, 2, 4], [1, 2, 0]]),
        "labels": torch.tensor([[0, 1, 1], [1, 0, -1]]),
    }


def make_model(name, **settings):
    cfg = ModelConfig(task="ctr", dim=8, **settings)
    model = ctr_baselines.BASELINES[name](cfg, LossConfig(), VOCABULARY).eval()
    torch.manual_seed(1)
    for module in model.modules():  # some start at 0
        for weight in module.parameters(recurse=False):
            torch.nn.init.normal_(weight.detach(), std=0.3)
        if getattr(module, "padding_idx", None) is not None:
            module.weight.detach()[module.padding_idx] = 0
    return model


def test_the_regression_sums_a_number_of_everything():
    model, batch = make_model("lr"), made_up_batch()
    weights = {name.removesuffix(".weight"): weight.detach() for name, weight in model.named_parameters()}
    for row, place in ((0, 1), (1, 1)):
        item, context = (batch[f"candidate_{name}"][row, place] for name in ("ids", "contexts"))
        parts = [
            weights["bias"],
            weights["user_embedding"][batch["user_ids"][row]],
            *(weights[f"profile_embeddings.{i}"][code] for i, code in enumerate(batch["profiles"][row])),
            weights["context_embedding"][context],
            weights["item_embedding"][item],
            *(weights["content_embeddings.0"][code] for code in FEATURES["genres"][item - 1]),
            weights["content_embeddings.1"] @ torch.from_numpy(FEATURES["image"][item - 1]),
        ]
        assert model.logits(batch)[row, place].item() == pytest.approx(sum(parts).item(), abs=1e-6)


def test_the_activation_unit_is_the_layers_of_the_paper():
    """Pair by pair, on [action, candidate, their product], and without a softmax."""
    model = make_model("din")
    candidates, actions = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.rand(2, 3, 5) < 0.6
    expected = torch.zeros(2, 3, 8)
    for row, place, t in mask.nonzero().tolist():
        q, k = candidates[row, place], actions[row, t]
        hidden = torch.nn.functional.silu(model.attention_hidden(torch.cat([k, q, k * q])))
        expected[row, place] += model.attention_weight(hidden) * k
    torch.testing.assert_close(model.pool(candidates, actions, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("name", ["item_ids", "actions", "contexts"])
def test_din_looks_at_what_the_candidate_may_see_and_no_further(name, window):
    model, batch = make_model("din", window=window), made_up_batch()
    before = model(without_labels(batch))
    for t in range(4):
        changed = batch[name].clone()
        changed[0, t] = changed[0, t] % 2 + 1
        moved = (model(batch | {name: changed}) - before).abs() > 1e-6
        seen = batch["history_lengths"][0]
        assert moved[0].tolist() == ((seen > t) & ((seen <= t + window) | (window == 0))).tolist()
        assert not moved[1].any()


def without_labels(batch):
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("name", ["lr", "din"])
def test_candidates_do_not_know_of_each_other(name):
    model, batch = make_model(name), without_labels(made_up_batch())
    together = model(batch)
    fields = [field for field in batch if field.startswith("candidate_")] + ["history_lengths"]
    for place in range(3):
        alone = model(batch | {field: batch[field][:, place : place + 1] for field in fields})
        torch.testing.assert_close(alone[:, 0], together[:, place])


def test_some_candidates_at_a_time_are_as_good_as_all(monkeypatch):
    """The same logits and, through recomputation, the same gradients."""
    model, batch = make_model("din").double(), made_up_batch()
    found = []
    for pairs in (1, 10**6):
        monkeypatch.setattr(ctr_baselines, "PAIRS", pairs)
        model.zero_grad()
        loss = model(batch)
        loss.backward()
        found.append([loss, *(weight.grad.clone() for weight in model.parameters())])
    torch.testing.assert_close(*found)
    assert all(weight.grad.any() for weight in model.parameters())


def test_what_is_no_candidate_is_no_part_of_the_loss():
    model, batch = make_model("din"), made_up_batch()
    loss = model(batch)
    logits = model({name: value for name, value in batch.items() if name != "labels"})
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0]])
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    torch.testing.assert_close(loss, losses.sum() - losses[1, 2])


FLAGS = [flag for flag in TINY if "negatives" not in flag] + ["--ctr_split=random", "--num_epochs=2"]


def run(*flags, cwd):
    return here(*flags, cwd=cwd, program=ctr_baselines.main)


@pytest.mark.parametrize("name", ["lr", "din"])
def test_a_run_with_the_recipe_of_another_model(tmp_path, name):
    write_csv(tmp_path / "tiny.csv")
    recipe = "task: ctr\nmodel_name: hstu\ntime_tokens: embedding\nn_layers: 4\ndataset: tiny.csv\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    flags = [flag for flag in FLAGS if "n_layers" not in flag and "n_heads" not in flag]
    shown = (
        run(f"--baseline={name}", "--out_dir=out", "--config=recipe.yaml", *flags, cwd=tmp_path).ok().stdout
    )
    result = read_json(tmp_path / "out" / "result.json")
    assert result["model_name"] == name and f"{result['test']['AUC']:.4f}" in shown
    evaluated = here("--out_dir=out", "--eval_only=true", cwd=tmp_path)  # by main.py, which lacks the model
    assert evaluated.errors == [f"error: --model_name={name} must be one of llama, hstu"]


@pytest.mark.parametrize(
    "flag", ["--n_layers=8", "--time_tokens=embedding", "--eval_only=true", "--resume=auto"]
)
def test_a_flag_without_effect_is_refused(tmp_path, flag):
    result = run("--baseline=din", flag, cwd=tmp_path)
    name = flag.partition("=")[0]
    assert result.errors == [f"error: {name} has no effect on --baseline=din: leave it out"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--baseline=nothing"], []])
def test_an_unknown_baseline_is_one_line(tmp_path, flags):
    result = run(*flags, cwd=tmp_path)
    assert result.code == 2 and "must be one of lr, din" in result.stderr
    assert len(result.text.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
