"""Results and their records: show the runs of several seeds, write the tables of the docs, remake a number.

    python scripts/results.py runs/p3_best-0 runs/p3_best-1                # mean ± sample standard deviation
    python scripts/results.py --record=p3_best runs/p3_best-0 >> configs/records/matching.jsonl
    python scripts/results.py --write                                      # README.md, docs/, configs/*.yaml
    python scripts/results.py --check=p3_best                              # run its commands and compare

A record is one line of a configs/records/*.jsonl: name, seed, commands, commit, date, machine, minutes,
metrics. Records of several seeds share their name. configs/records/blocks.md has a template of every
published table, which --write fills in between `<!-- block: NAME -->` and `<!-- end -->`, in YAML between
`# block: NAME` and `# end`:

    {p3_best test/NDCG@10}                .2023 ± .0009, mean and sample standard deviation over the seeds
    {p3_best minutes:.0f}                 the mean, in a format of Python's
    {p3_best n}                           the number of seeds
    {peers.json results/ours/users/s/median:,.0f}  a value of configs/records/peers.json; a table, if it is
                                          a list of rows or a dict
    {peers.json results/ours/users/s:,.0f}  median (min to max) of such a value
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "configs" / "records"
METRICS = ("NDCG@10", "HR@10", "HR@1", "NDCG@20", "MRR", "AUC", "GAUC", "logloss", "NE")  # of either task
SOME = (
    "new/NDCG@10",
    "new/HR@10",
    "liked/NDCG@10",
    "liked/HR@10",
    "cold/NDCG@10",
    "cold/HR@10",
    "time_NLL",
    "time_MAE",
)
RESULT = {"protocol", "commit", "date", "seed", "machine", "seconds", "best_epoch", "valid", "test"}
BLOCK = re.compile(r"^(# |<!-- )block: (\S+)( -->)?\n.*?^(# |<!-- )end( -->)?$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"\{(\S+) ([^{}:]+)(?::([^{}]+))?\}")
SEED_NOISE = {"NDCG@10": 0.004, "AUC": 0.004}  # what one seed may differ by where a record has no spread


# ---------------------------------------------------------------- records


@cache
def read_records(folder: Path = RECORDS) -> dict[str, list[dict]]:
    """{name: its records, one per seed} of all *.jsonl of a folder."""
    records = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            records.setdefault(record["run"], []).append(record)
    return records


def values(name: str, path: str, folder: Path = RECORDS) -> list:
    """What `path` ("test/NDCG@10") is in each record called `name`, or in a JSON file. Raises UserError for
    an unknown name or path."""
    if name.endswith(".json"):
        sources = [json.loads((folder / name).read_text())] if (folder / name).is_file() else []
    else:
        sources = read_records(folder).get(name, [])
    if not sources:
        raise UserError(f"no record {name} in {folder}")
    found = []
    for value in sources:
        keys = path
        while keys:  # names of metrics may hold a slash themselves
            key = next((k for k in value if keys == k or keys.startswith(f"{k}/")), None)
            if key is None:
                raise UserError(f"record {name} has no {path}")
            value, keys = value[key], keys[len(key) + 1 :]
        found.append(value)
    return found


def spread(numbers: list[float]) -> str:
    """ "mean ± sample standard deviation", or the value alone, with four digits: .2023 ± .0009"""
    parts = [statistics.mean(numbers), *([statistics.stdev(numbers)] if len(numbers) > 1 else [])]
    return " ± ".join(f"{part:.4f}".removeprefix("0") for part in parts)


def as_table(value: dict | list[dict]) -> str:
    """A list of rows, {name: number}, or {name: {size: number}} as a Markdown table."""
    if isinstance(value, dict):
        pairs = {name: v if isinstance(v, dict) else {"": v} for name, v in value.items()}
        value = [
            {"": name, "value": ", ".join(f"{key}: {number(v)}".removeprefix(": ") for key, v in row.items())}
            for name, row in pairs.items()
        ]
    lines = [list(value[0]), ["---"] * len(value[0]), *(map(number, row.values()) for row in value)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def fill(template: str, folder: Path = RECORDS) -> str:
    """A template with its placeholders replaced."""

    def value(match: re.Match) -> str:
        name, path, form = match.groups()
        found = values(name, "run" if path == "n" else path, folder)
        if path == "n":
            return str(len(found))
        if isinstance(found[0], dict) and form:
            return "{median} ({min} to {max})".format(**{key: format(x, form) for key, x in found[0].items()})
        if isinstance(found[0], dict | list):
            return as_table(found[0])
        if isinstance(found[0], str):
            return ", ".join(dict.fromkeys(found))
        return format(statistics.mean(found), form) if form else spread(found)

    return PLACEHOLDER.sub(value, template)


# ---------------------------------------------------------------- --write


def read_blocks(folder: Path = RECORDS) -> dict[str, str]:
    """{name: filled text} of the blocks of blocks.md, each under a heading `## name`."""
    _, *parts = re.split(r"^## (\S+)\n", (folder / "blocks.md").read_text(), flags=re.MULTILINE)
    return {name: fill(text.strip(), folder) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """The text of a file with every marked block written again. Raises UserError for an unknown one."""

    def block(match: re.Match) -> str:
        name = match[2]
        if name not in blocks:
            raise UserError(f"no block {name} in {RECORDS / 'blocks.md'}")
        begin, end = match[0].splitlines()[0], match[0].splitlines()[-1]
        comment = "# " if match[1] == "# " else ""
        return "\n".join([begin, *(comment + line for line in blocks[name].splitlines()), end])

    return BLOCK.sub(block, text)


def written_files(root: Path = ROOT) -> list[Path]:
    """The files that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("configs/*.yaml"))]


def write() -> None:
    blocks = read_blocks()
    for path in written_files():
        old = path.read_text()
        new = with_blocks(old, blocks)
        if new != old:
            path.write_text(new)
            print(f"written: {path.relative_to(ROOT)}")


# ---------------------------------------------------------------- results of runs


def read_result(path: Path) -> dict:
    """A result.json. Raises UserError if it is damaged or of another program."""
    try:
        found = json.loads(path.read_text())
        complete = found.keys() >= RESULT and all(
            isinstance(found[split], dict) for split in ("valid", "test")
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no result of a run ({error})") from None
    if not complete:
        raise UserError(f"{path} is no result of a training: it needs {', '.join(sorted(RESULT))}")
    return found


def read_results(folders: list[str]) -> list[dict]:
    """The result.json of each run. Raises UserError where one is missing or they are not comparable."""
    missing = [folder for folder in folders if not (Path(folder) / "result.json").is_file()]
    if missing:
        raise UserError(f"no result.json in {', '.join(missing)}: that run has not ended")
    results = [read_result(Path(folder) / "result.json") for folder in folders]
    protocols = {result["protocol"] for result in results}
    if len(protocols) > 1:
        raise UserError(f"these runs follow different protocols: {', '.join(sorted(protocols))}")
    return results


def show(results: list[dict]) -> None:
    first = results[0]
    processes = first.get("num_processes", first.get("world_size"))  # its name in older results
    names = [name for name in (*METRICS, *SOME) if name in first["test"]]  # by the first an epoch is chosen
    seen = ""
    if "HR@10" in names:
        seen = f"; history {'left out' if first['filter_seen'] else 'kept in'}"
    print(f"protocol  {first['protocol']}{seen}")
    print(f"commit    {', '.join(sorted({result['commit'] for result in results}))}")
    print(f"date      {first['date'][:10]}, {processes} process(es), {first['machine']}")
    print(f"seeds     {', '.join(str(result['seed']) for result in results)}")
    print(f"minutes   {', '.join(format(result['seconds'] / 60, '.1f') for result in results)}")
    print(f"epoch     {', '.join(str(result['best_epoch']) for result in results)} (best on validation)")
    print(f"valid     {names[0]} {spread([result['valid'][names[0]] for result in results])}")
    for name in names:
        print(f"test      {name} {spread([result['test'][name] for result in results])}")


def print_records(name: str, results: list[dict]) -> None:
    """One line per result, for a file of configs/records/."""
    for result in results:
        program, *flags = shlex.split(result["command"])
        flags = [flag for flag in flags if not flag.startswith("--out_dir")]
        count = result["num_processes"]
        start = f"torchrun --standalone --nproc_per_node={count}" if count > 1 else "python"
        record = {
            "run": name,
            "seed": result["seed"],
            "commands": [" ".join([start, program, *flags])],
            "commit": result["commit"],
            "date": result["date"][:10],
            "machine": result["machine"],
            "minutes": round(result["seconds"] / 60, 2),
            "best_epoch": result["best_epoch"],
        }
        for split in ("valid", "test"):
            record[split] = {metric: round(value, 6) for metric, value in result[split].items()}
        print(json.dumps(record))


# ---------------------------------------------------------------- --check


def within(known: list[float], new: float, noise: float) -> tuple[bool, str]:
    """Is a remade value within two standard deviations of the recorded seeds, or `noise` where there is one
    seed? With a sentence."""
    allowed = max(2 * statistics.stdev(known), 1e-4) if len(known) > 1 else noise
    why = f"two standard deviations of {len(known)} seeds" if len(known) > 1 else "the noise of a seed"
    good = abs(new - statistics.mean(known)) <= allowed
    verdict = "within" if good else "NOT within"
    return good, f"{spread([new])}, recorded {spread(known)}: {verdict} {spread([allowed])}, {why}"


def check(name: str, folder: Path = RECORDS) -> bool:
    """Run the commands of the first record called `name`, print how its test metric compares with the
    recorded seeds, and return whether it is within their spread. Raises UserError where a command fails."""
    start = {"torchrun": ["-m", "torch.distributed.run"], "python": []}
    with tempfile.TemporaryDirectory() as out:
        for command in values(name, "commands", folder)[0]:
            command = command.replace("$OUT", out) if "$OUT" in command else f"{command} --out_dir={out}"
            print(command, flush=True)
            program, *rest = shlex.split(command)
            if subprocess.run([sys.executable, *start[program], *rest], cwd=ROOT).returncode:
                raise UserError(f"{name} was not remade: {command}")
        folders = (Path(out), Path(out) / "run")  # the latter where other runs come before
        written = [folder / file for folder in folders for file in ("eval-best.json", "result.json")]
        found = [json.loads(path.read_text()) for path in written if path.is_file()]
    if not found:
        raise UserError(f"the commands of {name} write no result file: compare what they print")
    test = found[0]["test"]
    metric = next(metric for metric in SEED_NOISE if metric in test)
    good, sentence = within(values(name, f"test/{metric}", folder), test[metric], SEED_NOISE[metric])
    print(f"{name}: test {metric} {sentence}")
    return good


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--write", action="store_true", help="write all blocks of README.md, docs/, configs/")
    parser.add_argument("--check", metavar="NAME", help="remake a record and compare")
    parser.add_argument("--record", metavar="NAME", help="print the runs as records of that name")
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    args = parser.parse_args()
    if args.write:
        write()
    elif args.check:
        raise SystemExit(0 if check(args.check) else 1)
    elif not args.runs:
        parser.error("name the folders of runs, or --write, or --check=NAME")
    elif args.record:
        print_records(args.record, read_results(args.runs))
    else:
        show(read_results(args.runs))


if __name__ == "__main__":
    run_script(main)
