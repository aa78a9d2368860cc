"""Layouts and engines of several processes: the losses of one process, and its checkpoints.

CHECK_ALL_PAIRS=1 resumes the checkpoint of each with each other (scripts/check_scale.sh); else with one
process alone, and that of one process with each."""

import json
import os
from itertools import product

import pytest
import torch
from launch import MAIN, TINY, here, python, read_json, read_rows, read_state, torchrun, write_csv

SMALL = [flag for flag in TINY if not flag.startswith("--num_negatives")]
FLAGS = [
    *SMALL,
    "--dataset=data.csv",
    "--num_epochs=2",
    "--optimizer=adamw",
    "--dropout=0.2",
    "--save_every=5",
]
LAYOUTS = {
    "ddp": [],
    "fsdp": ["--parallel=fsdp"],
    "tp": ["--parallel=tp"],
    "dealt": ["--deal_items"],
    "fsdp, dealt": ["--parallel=fsdp", "--deal_items"],
    "tp, dealt": ["--parallel=tp", "--deal_items"],
}
ZERO = {f"zero-{stage}": ["--engine=deepspeed", f"--zero_stage={stage}"] for stage in (1, 2, 3)}
MANY = LAYOUTS | ZERO
BEGAN = ["one", *MANY] if os.environ.get("CHECK_ALL_PAIRS") == "1" else ["one"]
PROGRAM = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(MAIN.parent)!r})
import main
from reclm.flags import parse_args
from reclm.run import dist
with dist.distributed():
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        main.train(parse_args(flags))
"""
# Other models, each with layouts that must cut them elsewhere.
MODELS = {
    "softmax, odd number of heads and items": (
        ["--loss=softmax", "--n_heads=4", "--n_kv_heads=2", "--gated_residuals"],
        ["fsdp", "tp", "dealt", "tp, dealt"],
    ),
    "hstu": (["--model_name=hstu", "--n_layers=2", "--ema=0.9"], ["fsdp", "tp", "zero-2"]),
    "micro-batches": (["--grad_accum_steps=3"], ["ddp", "fsdp", "tp, dealt", "zero-2", "zero-3"]),
    "ctr": (["--task=ctr", "--ctr_split=random"], ["tp", "dealt", "zero-3"]),
    "muon": (["--optimizer=muon"], ["fsdp", "tp"]),
    "rows touched": (["--table_optimizer=rowwise_adagrad"], ["dealt", "fsdp, dealt"]),
}


def launch(runs: dict[str, list[str]], folder, processes: int = 2) -> None:
    """Train all in one launch: it is the imports that take long."""
    (folder / "program.py").write_text(PROGRAM)
    lines = [[*flags, f"--out_dir={name}"] for name, flags in runs.items()]
    (folder / "runs.json").write_text(json.dumps(lines))
    torchrun(processes, "runs.json", cwd=folder, program=folder / "program.py", timeout=400).ok()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write_csv(folder / "data.csv", num_items=26)
    here(*FLAGS, "--out_dir=one", cwd=folder).ok()
    launch({name: [*FLAGS, *flags] for name, flags in MANY.items()}, folder)
    return folder


@pytest.fixture(scope="module")
def resumed(work):
    """Each pair (who began, who goes on after the first epoch), in folders `began > goes on`"""
    for first in BEGAN:
        resume = [*FLAGS, f"--resume={first}/epoch_0.pth"]
        launch({f"{first} > {then}": [*resume, *flags] for then, flags in MANY.items()}, work)
    for first in MANY:
        here(*FLAGS, f"--resume={first}/epoch_0.pth", f"--out_dir={first} > one", cwd=work).ok()
    return work


def check_alike(folder, name: str, other: str, tolerance: float = 3e-6) -> None:
    """The same losses and metrics in each epoch."""
    for ours, theirs in zip(read_rows(folder / name), read_rows(folder / other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), (name, ours["epoch"])
    ours, theirs = (read_json(folder / run / "result.json")["test"] for run in (name, other))
    assert ours == pytest.approx(theirs, abs=1e-6), name


@pytest.mark.parametrize("name", MANY)
def test_losses_and_ranks_of_one_process(work, name):
    check_alike(work, name, "one")


@pytest.mark.parametrize("name", MANY)
def test_checkpoints_hold_whole_weights_and_moments_under_plain_names(work, name):
    ours, theirs = (read_state(work / run / "epoch_0.pth") for run in (name, "one"))
    assert ours["model"].keys() == theirs["model"].keys()
    for key, value in ours["model"].items():
        torch.testing.assert_close(value, theirs["model"][key], rtol=1e-4, atol=1e-6)
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for index, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(ours["optimizer"]["state"][index][key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MANY)
def test_one_process_goes_on(resumed, name):
    check_alike(resumed, f"{name} > one", "one")


@pytest.mark.parametrize(("first", "then"), [*product(BEGAN, MANY)])
def test_goes_on_from_another(resumed, first, then):
    check_alike(resumed, f"{first} > {then}", "one")


@pytest.mark.parametrize("model", MODELS)
def test_other_models(tmp_path, model):
    flags, names = MODELS[model]
    write_csv(tmp_path / "data.csv", num_items=26)
    flags = [*FLAGS, *flags]
    here(*flags, "--out_dir=one", cwd=tmp_path).ok()
    launch({name: [*flags, *MANY[name]] for name in names}, tmp_path)
    for name in names:
        check_alike(tmp_path, name, "one")


def test_parts_of_layers_and_of_weights(tmp_path):
    """Four processes: two groups of two."""
    write_csv(tmp_path / "data.csv", num_items=26)
    here(*FLAGS, "--out_dir=one", cwd=tmp_path).ok()
    both = ["--parallel=fsdp+tp", "--tp_size=2"]
    launch({"both": [*FLAGS, *both], "dealt": [*FLAGS, *both, "--deal_items"]}, tmp_path, processes=4)
    check_alike(tmp_path, "both", "one")
    check_alike(tmp_path, "dealt", "one")


def test_a_dealt_table_is_evaluated_by_any_number(work):
    for flags, launched in (([], python), (["--deal_items"], lambda *a, **k: torchrun(2, *a, **k))):
        launched("--eval_only", "--out_dir=dealt", *flags, cwd=work).ok()
        found = read_json(work / "dealt" / "eval-best.json")["test"]
        assert found == pytest.approx(read_json(work / "one" / "result.json")["test"], abs=1e-9)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parallel=tp", "--tp_size=3"], "--tp_size=3 does not fit 2 processes"),
        (["--parallel=tp", "--n_heads=1"], "--tp_size=2 does not divide --n_heads=1"),
        (["--tp_size=2"], "--tp_size=2 has no effect with --parallel=ddp"),
        (["--zero_stage=3"], "--zero_stage=3 has no effect with --engine=torch"),
        (["--parallel=fsdp", "--optimizer=adafactor"], "--optimizer=adafactor"),
        (["--parallel=fsdp", "--task=ctr", "--ctr_split=random"], "--task=ctr"),
        (["--deal_items", "--item_table=pq"], "--item_table=pq"),
        (["--engine=deepspeed", "--parallel=tp"], "leave out --parallel"),
        (
            ["--engine=deepspeed", "--deepspeed_config=none.json"],
            "--deepspeed_config=none.json cannot be read",
        ),
        (
            ["--engine=deepspeed", "--deepspeed_config=wrong.json"],
            "gradient_clipping contradicts --clip_norm=1.0",
        ),
        (["--engine=deepspeed", "--deepspeed_config=stage.json"], "stage 1 contradicts --zero_stage=2"),
    ],
)
def test_refused_in_one_line(tmp_path, flags, said):
    write_csv(tmp_path / "data.csv")
    (tmp_path / "wrong.json").write_text('{"gradient_clipping": 0.5}')
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 1}}')
    result = torchrun(2, *SMALL, "--dataset=data.csv", "--optimizer=adamw", *flags, cwd=tmp_path)
    assert result.code != 0 and len(result.errors) == 1 and said in result.errors[0], result.text
    assert not (tmp_path / "runs").exists()
