"""Mean and spread of runs that differ in their seed, as a row for configs/RESULTS.md.

python scripts/results.py runs/default-0 runs/default-1 runs/default-2
"""

import json
import statistics
import sys
from pathlib import Path

METRICS = ("NDCG@10", "HR@10", "HR@1", "NDCG@20", "MRR", "AUC", "GAUC", "logloss", "NE")  # of either task
SOME = (  # of runs with --negative_below, --cold_items or --time_head
    "liked/NDCG@10", "liked/HR@10", "cold/NDCG@10", "cold/HR@10",
    "time_NLL", "time_NLL_last_gap", "time_NLL_user_mean",
    "time_MAE", "time_MAE_last_gap", "time_MAE_user_mean",
)  # fmt: skip


def spread(values: list[float]) -> str:
    """ "mean ± sample standard deviation", or the value alone."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def main(folders: list[str]) -> None:
    if not folders:
        raise SystemExit(__doc__)
    missing = [folder for folder in folders if not (Path(folder) / "result.json").is_file()]
    if missing:
        raise SystemExit(f"error: no result.json in {', '.join(missing)}: that run has not ended")
    results = [json.loads((Path(folder) / "result.json").read_text()) for folder in folders]
    protocols = {result["protocol"] for result in results}
    if len(protocols) > 1:
        raise SystemExit(f"error: these runs follow different protocols: {', '.join(sorted(protocols))}")
    first = results[0]
    processes = first.get("num_processes", first.get("world_size"))  # its name in older results
    names = [name for name in (*METRICS, *SOME) if name in first["test"]]  # by the first an epoch is chosen
    seen = ""
    if "HR@10" in names:
        seen = f"; seen items {'left out' if first['filter_seen'] else 'kept in'}"
    print(f"protocol  {first['protocol']}{seen}")
    print(f"commit    {', '.join(sorted({result['commit'] for result in results}))}")
    print(f"date      {first['date'][:10]}, {processes} process(es), {first['machine']}")
    print(f"seeds     {', '.join(str(result['seed']) for result in results)}")
    print(f"minutes   {', '.join(format(result['seconds'] / 60, '.1f') for result in results)}")
    print(f"epoch     {', '.join(str(result['best_epoch']) for result in results)} (best on validation)")
    print(f"valid     {names[0]} {spread([result['valid'][names[0]] for result in results])}")
    for name in names:
        print(f"test      {name} {spread([result['test'][name] for result in results])}")


if __name__ == "__main__":
    main(sys.argv[1:])
