"""scripts/baselines.py: popularity, a Markov chain and tables of gaps by hand."""

import subprocess
import sys

import numpy as np
from conftest import make_dataset
from launch import MAIN, environment, here, write_csv

sys.path.insert(0, str(MAIN.parent / "scripts"))
import baselines

from reclm.errors import run_script

SCRIPT = MAIN.parent / "scripts" / "baselines.py"
HISTORIES = [[1, 2, 3, 1, 4], [1, 2, 1, 2, 4, 3], [2, 3]]  # the last two of the first two are held out


def test_popularity_counts_training_items():
    assert baselines.popularity(make_dataset(HISTORIES)).tolist() == [0, 3, 4, 2, 0]


def test_chain_counts_pairs_within_a_users_training_items():
    chain = baselines.markov_chain(make_dataset(HISTORIES))
    expected = np.zeros((5, 5))
    for before, after in [(1, 2), (2, 3), (1, 2), (2, 1), (1, 2), (2, 3)]:
        expected[before, after] += 1
    np.testing.assert_allclose(np.floor(chain), expected)
    assert chain[4].argsort().tolist()[::-1][:3] == [2, 1, 3]  # never followed: by popularity


def test_a_table_of_gaps_by_hand():
    """Training gaps 5, 5, 0 and 5, 0, 5; both targets follow the gap 5, so the table knows 5, 0, 0."""
    dataset = make_dataset([[1] * 6, [1] * 6])
    dataset.timestamps[:] = [0, 5, 10, 10, 15, 20, 0, 5, 5, 10, 15, 15]
    rows = dataset.offsets[1:] - 1
    got = baselines.gap_table(dataset, 1, True, 1.0, rows)
    histogram = np.ones(baselines.NUM_BUCKETS)
    histogram[[0, 5]] += [2, 4]
    expected = []
    for user, gap in enumerate((5, 0)):
        count = {5: 1, 0: 2}[gap]
        probability = (count + histogram[gap] / histogram.sum()) / (3 + 1)
        x = gap + (user + 1) * (5**0.5 - 1) / 2 % 1
        expected.append(-np.log(probability) - np.log1p(x))
    assert abs(got["time_NLL"] - np.mean(expected)) < 1e-9


def run(*flags, cwd):
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment())


def test_it_ranks_in_the_harness(tmp_path):
    """In these data the last item determines the next, so the chain is always right."""
    write_csv(tmp_path / "tiny.csv")
    shown = run("--dataset=tiny.csv", cwd=tmp_path).stdout
    popular, chain = shown.split("TEST, ")[1:]
    assert popular.startswith("popularity") and chain.startswith("Markov chain")
    first = {name: float(part.split("HR@K")[1].split()[0]) for name, part in (("p", popular), ("c", chain))}
    assert first["c"] == 1.0 and first["p"] < 0.5


def test_bad_data_is_one_line(tmp_path):
    shown = here("--dataset=none.csv", cwd=tmp_path, program=lambda: run_script(baselines.main))
    assert shown.code == 2 and len(shown.errors) == 1 and "none.csv" in shown.errors[0]
