"""Each --optimizer against its paper's equations, in float64; exact resume; refusals."""

import math
import subprocess
import sys

import pytest
import torch
from launch import MAIN, TINY, environment, here, read_state, snapshot, torchrun, write_csv
from torch import nn

from model import SequenceRecommender
from reclm.config import LossConfig, ModelConfig, TrainConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.run.in_backward import InBackward
from reclm.run.optim import OPTIMIZERS, build_optimizer, set_rates, take_step
from reclm.run.sophia import draw_targets

STEPS = 12
DECAY = {"table": 0.1, "layer": 0.3, "gain": 0.0}


def toy() -> nn.ModuleDict:
    """A table, a matrix and a vector: one weight in each group."""
    torch.manual_seed(0)
    layers = {"table": nn.Embedding(24, 8), "layer": nn.Linear(8, 6, bias=False), "gain": nn.RMSNorm(8)}
    return nn.ModuleDict(layers)


def gradients(model: nn.Module, seed: int) -> dict:
    """One random gradient per weight; half of the rows of the table have none."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    found["table.weight"][seed % 2 :: 2] = 0
    return {name.removesuffix(".weight"): gradient for name, gradient in found.items()}


def rms(x):
    return x.square().mean().sqrt()


# Each reference updates a float64 weight w in step t, counted from 1, given its gradient g, a dict for its
# state, the learning rate and the weight decay.


def adamw(w, g, s, t, lr, decay):
    """arXiv 1711.05101, algorithm 2"""
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.98 * s.get("v", 0) + 0.02 * g**2
    update = s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.98**t)).sqrt() + 1e-8)
    return w - lr * update - lr * decay * w


def adafactor(w, g, s, t, lr, decay):
    """arXiv 1804.04235, algorithms 4 and 5, with decoupled weight decay"""
    beta = 1 - t**-0.8
    if w.dim() < 2:
        s["v"] = beta * s.get("v", 0) + (1 - beta) * g**2
        second = s["v"]
    else:
        s["r"] = beta * s.get("r", 0) + (1 - beta) * g.square().mean(1)
        s["c"] = beta * s.get("c", 0) + (1 - beta) * g.square().mean(0)
        second = torch.outer(s["r"], s["c"]) / s["r"].mean()
    update = torch.where(g == 0, 0, g / second.sqrt())
    update = update / max(1.0, rms(update).item())
    alpha = max(1e-3, rms(w).item()) * min(lr, t**-0.5)
    return w * (1 - lr * decay) - alpha * update


def muon(w, g, s, t, lr, decay):
    """Nesterov momentum, orthogonalised by five steps of Newton-Schulz; rate of arXiv 2502.16982, eq. 4"""
    s["m"] = 0.95 * s.get("m", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * s["m"]
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return w - lr * 0.2 * math.sqrt(max(w.shape)) * x - lr * decay * w


def rowwise_adagrad(w, g, s, t, lr, decay):
    """Adagrad with the mean of the squares of each row"""
    s["sum"] = s.get("sum", 0) + g.square().mean(1, keepdim=True)
    return w - lr * decay * w - torch.where(g == 0, 0, lr * g / (s["sum"].sqrt() + 1e-8))


def sgd(w, g, s, t, lr, decay):
    return w - lr * (g + decay * w)


REFERENCES = {  # flags: the rule of each of DECAY's weights
    "adamw": ({}, dict.fromkeys(DECAY, adamw)),
    "adafactor": ({}, dict.fromkeys(DECAY, adafactor)),
    "muon": ({}, {"table": adamw, "layer": muon, "gain": adamw}),
    "rowwise": (
        {"optimizer": "adamw", "table_optimizer": "rowwise_adagrad", "table_lr": 0.3},
        {"table": rowwise_adagrad, "layer": adamw, "gain": adamw},
    ),
    "lomo": ({"clip_norm": 0.0}, dict.fromkeys(DECAY, sgd)),
    "adalomo": ({}, dict.fromkeys(DECAY, adafactor)),
}


def settings(name: str, **flags) -> TrainConfig:
    given = {"optimizer": name, "weight_decay": 0.3, "embedding_decay": 0.1, "lr": 0.05, "warmup_steps": 3}
    return TrainConfig(**given | flags)


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_paper(name):
    flags, rules = REFERENCES[name]
    cfg, model = settings(name, **flags), toy()
    optimizer = build_optimizer(model, cfg)
    expected = {key: model[key].weight.detach().double() for key in rules}
    states = {key: {} for key in rules}
    for t in range(1, STEPS + 1):
        set_rates(optimizer, t - 1, STEPS, cfg)
        found = gradients(model, t)
        optimizer.zero_grad()
        sum((model[key].weight * found[key]).sum() for key in rules).backward()
        take_step(optimizer, pytest.fail, 1)
        warm = min(1, t / 3) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 1) / STEPS)))
        for key, rule in rules.items():
            peak = cfg.table_lr if rule is rowwise_adagrad else cfg.lr
            expected[key] = rule(expected[key], found[key].double(), states[key], t, peak * warm, DECAY[key])
    for key, weight in expected.items():
        found = model[key].weight.detach().double()
        torch.testing.assert_close(found, weight, atol=2e-6, rtol=2e-5, msg=key)


def test_sophia_steps_are_those_of_the_paper():
    """arXiv 2305.14342, algorithms 2 and 3: the curvature is estimated in steps 1 and 11."""
    cfg, model, num_targets = settings("sophia", lr=1e-2), toy(), 5000
    optimizer, estimates = build_optimizer(model, cfg), 0

    def set_gradients(seed):
        for key, gradient in gradients(model, seed).items():
            model[key].weight.grad = gradient / 30

    def again(relabel):
        nonlocal estimates
        assert relabel is draw_targets
        estimates += 1
        set_gradients(1000 + estimates)

    expected = {key: model[key].weight.detach().double() for key in DECAY}
    m, h = (dict.fromkeys(DECAY, 0.0) for _ in range(2))
    clipped = []
    for t in range(1, STEPS + 1):
        set_rates(optimizer, t - 1, STEPS, cfg)
        rate = optimizer.param_groups[0]["lr"]
        set_gradients(t)
        take_step(optimizer, again, num_targets)
        for key, gradient in gradients(model, t).items():
            m[key] = 0.96 * m[key] + 0.04 * gradient.double() / 30
            if t in (1, 11):
                other = gradients(model, 1001 + t // 10)[key].double() / 30
                h[key] = 0.99 * h[key] + 0.01 * num_targets * other**2
            ratio = m[key] / (0.05 * h[key]).clamp(min=1e-12)
            clipped.append((ratio.abs() > 1).float().mean())
            expected[key] = expected[key] * (1 - rate * DECAY[key]) - rate * ratio.clamp(-1, 1)
    assert estimates == 2 and 0.1 < sum(clipped) / len(clipped) < 0.9  # both sides of the clipping
    for key, weight in expected.items():
        torch.testing.assert_close(model[key].weight.detach().double(), weight, atol=1e-5, rtol=1e-4)


def test_sophia_draws_targets_from_the_softmax_of_the_next_pass():
    """Frequencies against the softmax over unseen items; the random state is the one before."""
    torch.manual_seed(0)
    cfg = ModelConfig(dim=16, max_len=4, n_layers=1, dropout=0.0)
    model = SequenceRecommender(cfg, LossConfig(loss="softmax"), Vocabulary(10, 1))
    ids = torch.tensor([[3, 5, 9, 0]]).repeat(4000, 1)
    batch = {
        "item_ids": ids, "lengths": torch.full((len(ids),), 3), "targets": ids.roll(-1, 1),
        "user_ids": torch.zeros(len(ids), dtype=torch.long), "num_before": torch.zeros(len(ids)).long(),
        "seen_items": torch.tensor([[3, 5, 9]]).repeat(len(ids), 1),
    }  # fmt: skip
    batch["targets"][:, 2:] = 0  # two targets per row
    before = torch.get_rng_state()
    drawn = draw_targets(model, batch)["targets"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn != 0, batch["targets"] != 0)
    scores = (model.encode(batch)[0] @ model.item_table().T).detach()  # (T, V)
    scores[:, [0, 3, 5, 9]] = -torch.inf
    for t in range(2):
        frequencies = torch.bincount(drawn[:, t], minlength=11) / len(drawn)
        torch.testing.assert_close(frequencies, scores[t].softmax(0), atol=0.03, rtol=0)
    assert (frequencies[scores[t] > -torch.inf] - 1 / 7).abs().max() > 0.06  # far from uniform


@pytest.fixture
def eager(monkeypatch):
    """The step of adamw8bit as where there is no compiler: compiling takes half a minute."""
    monkeypatch.setattr("reclm.run.eight_bit.HAS_COMPILER", False)


def test_8_bit_steps_are_near_those_of_adamw(eager):
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(64, 64)})
        start = model["layer"].weight.detach().clone()
        cfg = settings(name)
        optimizer = build_optimizer(model, cfg)
        for t in range(STEPS):
            set_rates(optimizer, t, STEPS, cfg)
            model["layer"].weight.grad = torch.randn(64, 64)
            take_step(optimizer, pytest.fail, 1)
        weights.append(model["layer"].weight.detach() - start)
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == torch.uint8
    exact, near = weights
    assert 1e-4 < (near - exact).norm() / exact.norm() < 0.05


class Peak:
    """Counts the gradients that are held at once in a backward pass."""

    def __init__(self, model: nn.Module):
        self.model, self.most = model, 0
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(self.look)

    def look(self, weight):
        self.most = max(self.most, sum(w.grad is not None for w in self.model.parameters()))


@pytest.mark.parametrize(("inner", "name"), [("sgd", "lomo"), ("adafactor", "adalomo")])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_in_backward_gives_the_same_weights_without_all_gradients(inner, name, clip_norm):
    """Bit for bit those of the ordinary optimizer after clipping; at most one gradient lives at a time."""
    plain, ours = toy(), toy()
    kinds = {"sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}
    optimizer = kinds[inner](plain.parameters(), lr=0.1)
    peak = Peak(ours)  # its hook comes first
    backward = InBackward(kinds[inner](ours.parameters(), lr=0.1), clip_norm)
    x = torch.arange(24)

    def loss(model):
        return (
            model["gain"](model["layer"](model["table"](x)).sum(1, keepdim=True) + torch.ones(8)) ** 2
        ).sum()

    def again():
        backward.zero_grad()
        loss(ours).backward()

    for _ in range(3):
        optimizer.zero_grad()
        loss(plain).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or math.inf)
        assert norm > 0.5
        optimizer.step()
        again()
        torch.testing.assert_close(backward.norm(), norm)
        take_step(backward, again, 1)
        assert all(weight.grad is None for weight in ours.parameters())
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert peak.most == 1


# ---------------------------------------------------------------- runs

FLAGS = [*TINY, "--dataset=tiny.csv", "--loss=softmax", "--num_epochs=3"]
FLAGS = [flag for flag in FLAGS if not flag.startswith(("--num_negatives", "--lr"))]
RUNS = {name: [f"--optimizer={name}"] for name in OPTIMIZERS} | {
    "tables": ["--table_optimizer=rowwise_adagrad"],
    "adamw8bit": ["--optimizer=adamw8bit", "--dim=64"],  # large enough for moments of 8 bits
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_resumes_exactly(name, tmp_path, eager):
    write_csv(tmp_path / "tiny.csv")
    flags = [*FLAGS, *RUNS[name]]
    here(*flags, "--out_dir=whole", cwd=tmp_path).ok()
    here(*flags, "--out_dir=rest", "--resume=whole/epoch_0.pth", cwd=tmp_path).ok()
    whole, rest = (read_state(tmp_path / run / "epoch_2.pth") for run in ("whole", "rest"))
    for key, weight in whole["model"].items():
        assert torch.equal(weight, rest["model"][key]), key
    assert whole["optimizer"]["state"].keys() == rest["optimizer"]["state"].keys()
    for index, values in whole["optimizer"]["state"].items():
        for key, value in values.items():
            assert torch.equal(value, rest["optimizer"]["state"][index][key]), key
    first, *_, last = whole["history"]
    assert last["loss"] < first["loss"] - 0.02


@pytest.mark.parametrize("name", ["lomo", "sophia"])
def test_two_processes_keep_the_same_weights(name, tmp_path):
    """With LOMO those of one process; with Sophia, each process draws targets of its own."""
    write_csv(tmp_path / "tiny.csv")
    program = tmp_path / "compare_processes.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(MAIN.parent)!r})\n"
        "import main\nfrom reclm.run import dist\n"
        "def compare(run):\n"
        "    sums = [float(weight.double().sum()) for weight in run.model.parameters()]\n"
        "    first, second = dist.gather_from_processes(sums)\n"
        "    assert first == second\n"
        "    print('the same')\n"
        "main.report_test = compare\nmain.main()\n"
    )
    flags = [*FLAGS, f"--optimizer={name}", "--num_epochs=2"]
    shown = torchrun(2, *flags, "--out_dir=two", cwd=tmp_path, program=program).ok().stdout
    assert shown.count("the same") == 2
    if name == "lomo":
        here(*flags, "--out_dir=one", cwd=tmp_path).ok()
        one, two = (read_state(tmp_path / run / "last.pth")["model"] for run in ("one", "two"))
        for key, weight in one.items():
            torch.testing.assert_close(weight, two[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("flags", [{"optimizer": "muon"}, {"table_optimizer": "rowwise_adagrad"}])
@pytest.mark.parametrize("trained", ["table", "layer"])
def test_a_part_of_the_model_may_be_frozen(flags, trained):
    model = toy().requires_grad_(False)
    model[trained].requires_grad_(True)
    optimizer = build_optimizer(model, TrainConfig(**flags))
    assert [w for group in optimizer.param_groups for w in group["params"]] == [model[trained].weight]


def test_a_checkpoint_of_one_optimizer_is_refused_by_another(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    here(*FLAGS, "--out_dir=run", cwd=tmp_path).ok()
    before = snapshot(tmp_path)
    for flag in ("--optimizer=adafactor", "--table_optimizer=rowwise_adagrad"):
        result = here(*FLAGS, flag, "--resume=run/epoch_0.pth", cwd=tmp_path)
        assert result.code == 2 and len(result.errors) == 1, result.text
        assert f"{flag} contradicts run/epoch_0.pth" in result.text
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "lomo", "grad_accum_steps": 2}, "--optimizer=lomo updates the weights in each"),
        ({"optimizer": "sophia"}, "--optimizer=sophia draws targets from the softmax over all items"),
        ({"optimizer": "sophia", "loss": "softmax", "time_head": True}, "without --time_head"),
        ({"optimizer": "sophia", "task": "ctr"}, "--optimizer=sophia draws targets"),
        ({"table_optimizer": "rowwise_adagrad", "table_lr": 0.0}, "--table_lr=0.0 must be"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        build_config(flags)


def test_adamw8bit_without_torchao_names_the_remedy(tmp_path):
    write_csv(tmp_path / "tiny.csv")
    (tmp_path / "torchao.py").write_text("raise ImportError\n")
    before = snapshot(tmp_path)
    code = f"import sys; sys.path[:0] = ['.', {str(MAIN.parent)!r}]; import main; main.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *FLAGS, "--optimizer=adamw8bit", "--out_dir=run"],
        cwd=tmp_path, text=True, capture_output=True, env=environment({"PYTHONDONTWRITEBYTECODE": "1"}),
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install -r requirements-adapt.txt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists() and snapshot(tmp_path) == before
