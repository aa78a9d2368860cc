"""Two hosts without a shared disk: two agents of torchrun on one machine, each with folders of its own."""

import shutil
import socket
import subprocess
import sys

import pytest
from launch import MAIN, TINY, environment, here, read_json, read_rows, write_csv

FLAGS = [*TINY, "--dataset=data.csv", "--num_epochs=2", "--out_dir=run"]


def on_two_hosts(folders, *flags: str, programs=(MAIN, MAIN)) -> list[subprocess.CompletedProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number, (folder, program) in enumerate(zip(folders, programs, strict=True)):
        where = ["--nnodes=2", f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc_per_node=1"]
        processes.append(
            subprocess.Popen(
                [*command, str(program), *flags], cwd=folder, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment({"RECLM_CACHE": str(folder / "cache")}),
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture
def hosts(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "data.csv")
    return [tmp_path / "a", tmp_path / "b"]


def test_what_one_host_lacks_comes_from_the_first(hosts, tmp_path):
    """Starting from a checkpoint, evaluating, and resuming: only the first host has the files of the runs.
    Each prepares the data for itself."""
    write_csv(tmp_path / "data.csv")
    here(*FLAGS, cwd=tmp_path).ok()
    shutil.copytree(tmp_path / "run", hosts[0] / "run")
    for flags in ([*FLAGS, "--init_from=run/best.pth", "--out_dir=new"], ["--eval_only", "--out_dir=new"]):
        for host in on_two_hosts(hosts, *flags):
            assert host.returncode == 0, host.stdout
    assert (hosts[0] / "new" / "eval-best.json").is_file() and not (hosts[1] / "new").exists()
    assert list((hosts[1] / "cache").iterdir())
    for host in on_two_hosts(hosts, *FLAGS, "--resume=run/epoch_0.pth", "--out_dir=on"):
        assert host.returncode == 0, host.stdout
    ours, theirs = hosts[0] / "on", tmp_path / "run"
    losses = [[row["loss"] for row in read_rows(folder)] for folder in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    results = [read_json(folder / "result.json")["test"] for folder in (ours, theirs)]
    assert results[0] == pytest.approx(results[1], abs=1e-9)


def test_other_data_on_one_host_are_named(hosts):
    write_csv(hosts[1] / "data.csv", num_users=41)
    shown = on_two_hosts(hosts, *FLAGS)
    assert all(host.returncode for host in shown)
    assert f"error: process 1 on {socket.gethostname()} has other data than process 0" in shown[0].stdout
    assert not (hosts[0] / "run").exists()


def test_other_code_on_one_host_is_named(hosts, tmp_path):
    for name in ("reclm", "main.py", "model.py", "data.py", "evaluate.py"):
        source, target = MAIN.parent / name, tmp_path / "other" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    with open(tmp_path / "other" / "reclm" / "metrics.py", "a") as file:
        file.write("# changed\n")
    shown = on_two_hosts(hosts, *FLAGS, programs=(MAIN, tmp_path / "other" / "main.py"))
    assert all(host.returncode for host in shown)
    assert f"error: process 1 on {socket.gethostname()} has other code than process 0" in shown[0].stdout
