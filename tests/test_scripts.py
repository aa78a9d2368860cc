"""scripts/results.py: means and spreads by hand; scripts/plot_runs.py: curves and refusals."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "results.py"


RANKING = ("NDCG@10", "HR@10", "HR@1", "NDCG@20", "MRR")


def write_result(folder, seed, score, protocol="P3", names=RANKING):
    metrics = dict.fromkeys(names, score)
    folder.mkdir()
    result = {
        "protocol": protocol, "commit": "abc", "date": "2026-01-02 03:04:05", "num_processes": 2,
        "machine": "m", "seed": seed, "seconds": 90.0, "best_epoch": 7, "valid": metrics, "test": metrics,
    }  # fmt: skip
    if names == RANKING:  # CTR filters nothing
        result["filter_seen"] = True
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def run(*folders):
    return subprocess.run([sys.executable, str(SCRIPT), *folders], capture_output=True, text=True)


def test_mean_and_sample_deviation(tmp_path):
    folders = [write_result(tmp_path / str(i), i, score) for i, score in enumerate((0.1, 0.2, 0.3))]
    shown = run(*folders).stdout
    assert "test      NDCG@10 0.2000 ± 0.1000" in shown  # sqrt((.01 + 0 + .01) / 2)
    assert "seeds     0, 1, 2" in shown and "minutes   1.5, 1.5, 1.5" in shown


def test_ctr_has_metrics_of_its_own(tmp_path):
    names = ("logloss", "AUC", "GAUC", "NE")
    folders = [write_result(tmp_path / str(i), i, 0.5 + i / 10, "CTR", names) for i in range(2)]
    shown = run(*folders).stdout
    assert "valid     AUC 0.5500 ± 0.0707" in shown and "test      logloss 0.5500" in shown
    assert "NDCG" not in shown and "protocol  CTR\n" in shown


def test_refuses_unfinished_runs_and_mixed_protocols(tmp_path):
    first = write_result(tmp_path / "a", 0, 0.1)
    other = write_result(tmp_path / "b", 0, 0.1, protocol="P2")
    for folders, word in (((first, other), "different protocols"), ((str(tmp_path / "c"),), "has not ended")):
        result = run(*folders)
        assert result.returncode != 0 and word in result.stderr and "Traceback" not in result.stderr


PLOT = SCRIPT.with_name("plot_runs.py")


def plot(*arguments):
    return subprocess.run([sys.executable, str(PLOT), *arguments], capture_output=True, text=True)


def test_curves_of_a_folder_and_of_a_file(tmp_path):
    rows = [{"train_seconds": 60.0, "valid/NDCG@10": 0.1}, {"train_seconds": 30.0, "valid/NDCG@10": 0.2}]
    for path in (tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.path.insert(0, str(PLOT.parent))
    import plot_runs

    assert plot_runs.read_curve(tmp_path) == ([1.0, 1.5], [0.1, 0.2])
    plot(
        f"--out={tmp_path / 'out.png'}", f"d = 1={tmp_path}", f"b={tmp_path / 'other.jsonl'}"
    ).check_returncode()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for path in ("none", "bad.jsonl"):
        result = plot(f"--out={tmp_path / 'out.png'}", f"a={tmp_path / path}")
        assert result.returncode != 0 and path in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.png").exists()
