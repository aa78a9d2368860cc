"""Check a run on two hosts of which workers and hosts are killed and come back. Linux, root; five minutes.

    python scripts/check_hosts.py --out=configs/records/hosts.json

Each host is a network namespace of this machine. They meet at scripts/rendezvous.py, outside of both. Printed
are the seconds from each event to the next step that was trained. In the end the metrics must be those of a
run of one process that nothing disturbed, to six decimals.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from reclm.errors import UserError, run_script
from reclm.run.logger import say
from reclm.run.output import ScriptParser, write_whole
from reclm.run.report import stamp

MAIN = Path(__file__).parent.parent / "main.py"
BRIDGE, HOSTS = "reclm-bridge", ("reclm-host0", "reclm-host1")
ADDRESS, PORT = "10.77.0.{}", 29500  # .1 and .2 are the hosts, .9 is the machine itself
PATIENCE = 120  # seconds until an event counts as lost
TRAINING = (
    "--dataset=actions.csv --dim=32 --n_layers=1 --n_heads=2 --max_len=20 --batch_size=4 --num_negatives=16 "
    "--num_epochs=60 --keep_last=1 --device=cpu --save_every=5"
).split()
LIMITS = {"worker killed": 15, "host killed": 15, "host back": 20}  # seconds, on an idle machine


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`ip {' '.join(words)}` failed ({done.stderr.strip()}): run this as root")


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces at a bridge; taken down in the end."""
    take_down()  # what a run that was killed has left
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", ADDRESS.format(9) + "/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, host in enumerate(HOSTS):
            ip("netns", "add", host)
            ip("link", "add", f"reclm{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", f"reclm{number}", "master", BRIDGE, "up")
            inside = ("-n", host)
            ip(*inside, "addr", "add", ADDRESS.format(number + 1) + "/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield
    finally:
        take_down()


def take_down() -> None:
    for host in HOSTS:
        for pid in processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def processes(host: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


class Run:
    """The run on both hosts, in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.agents = folder, {}

    def start(self, host: str) -> None:
        """torchrun on a host"""
        number = HOSTS.index(host)
        beats = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,join_timeout=60"
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=9", "--rdzv-backend=c10d"]
        command += ["--rdzv-id=check", f"--rdzv-endpoint={ADDRESS.format(9)}:{PORT}"]
        command += [f"--rdzv-conf=is_host=0,{beats}", f"--local-addr={ADDRESS.format(number + 1)}"]
        command += [str(MAIN), *TRAINING, "--resume=auto", "--out_dir=run"]
        ours = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.folder / f"{host}.log", "a") as log:
            self.agents[host] = subprocess.Popen(
                command, cwd=self.folder, env=environment() | ours, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def kill_host(self, host: str) -> None:
        for pid in processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agents.pop(host).wait()

    def workers(self, host: str) -> dict[int, int]:
        """{process id: number of processes of its run}"""
        found = {}
        for pid in processes(host):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                world = [int(v.partition(b"=")[2]) for v in variables if v.startswith(b"WORLD_SIZE=")]
                if world and str(MAIN).encode() in command and b"torch.distributed.run" not in command:
                    found[pid] = world[0]
        return found

    def place(self) -> tuple[int, int]:
        """(epoch, step) that last.pth holds"""
        try:
            progress = torch.load(self.folder / "run" / "last.pth", weights_only=True)["progress"]
        except (OSError, RuntimeError):
            return -1, 0
        return progress["epoch"], progress["step"]

    def wait_for_steps(self, *hosts: str) -> float:
        """Seconds until a step more is saved by a run of exactly these hosts"""
        begin = time.monotonic()
        while True:
            worlds = [world for host in hosts for world in self.workers(host).values()]
            if worlds == [len(hosts)] * len(hosts):
                break
            self.check(begin)
        before = self.place()
        while self.place() <= before:
            self.check(begin)
        return time.monotonic() - begin

    def check(self, begin: float) -> None:
        """Raises UserError if this takes too long, or an agent has ended."""
        ended = [host for host, agent in self.agents.items() if agent.poll() is not None]
        if ended or time.monotonic() - begin > PATIENCE:
            logs = "".join((self.folder / f"{host}.log").read_text()[-3000:] for host in ended or HOSTS)
            what = f"torchrun on {ended[0]} ended" if ended else f"no step in {PATIENCE} s"
            raise UserError(f"{what}: use a machine with less load, or see\n{logs}")
        time.sleep(0.1)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


def write_actions(path: Path) -> None:
    """Users cycle through the items, each from another one on."""
    rows = [f"{user},{(user + t) % 40},{t}\n" for user in range(200) for t in range(12 + user % 9)]
    path.write_text("user,item,timestamp\n" + "".join(rows))


def numbers(folder: Path) -> dict[str, float]:
    """The loss of each epoch, and the test metrics"""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {f"the loss of epoch {row['epoch']}": row["loss"] for row in lines}
    return losses | json.loads((folder / "result.json").read_text())["test"]


def undisturbed(folder: Path) -> dict[str, float]:
    """`numbers` of the same training in one process"""
    command = [sys.executable, str(MAIN), *TRAINING, "--out_dir=alone"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    return numbers(folder / "alone")


def check(folder: Path) -> list[dict]:
    """Rows of seconds from each event to the next step."""
    write_actions(folder / "actions.csv")
    first, second = HOSTS
    store = subprocess.Popen(
        [sys.executable, str(MAIN.parent / "scripts" / "rendezvous.py"), f"--port={PORT}"], env=environment()
    )
    run, rows = Run(folder), []
    try:
        time.sleep(5)
        for host in HOSTS:
            run.start(host)

        def note(event: str, *hosts: str) -> None:
            seconds = run.wait_for_steps(*hosts)
            rows.append({"event": event, "next step after, s": seconds, "goal, s": LIMITS.get(event, "")})
            say(f"{event}: the next step after {seconds:.1f} s")

        note("both started", *HOSTS)
        for host, other in ((second, first), (first, second)):
            os.kill(next(iter(run.workers(host))), signal.SIGKILL)
            note("worker killed", *HOSTS)
            run.kill_host(host)
            note("host killed", other)
            run.start(host)
            note("host back", *HOSTS)
        for agent in run.agents.values():
            if agent.wait(600):
                raise UserError(f"torchrun failed: see {folder}")
    finally:
        store.kill()
    ours, alone = numbers(folder / "run"), undisturbed(folder)
    for name, value in alone.items():
        if abs(ours[name] - value) > 1e-6:
            raise UserError(f"{name} is {ours[name]}, that of one process {value}")
    say(f"{len(alone)} losses and metrics are those of one process to six decimals")
    return rows


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--out", type=Path, help="also write the seconds to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reclm-hosts-") as folder, network():
        record = stamp() | {"load": os.getloadavg()[0]} | {"rows": check(Path(folder))}
    if args.out:
        write_whole(args.out, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))


if __name__ == "__main__":
    run_script(main)
