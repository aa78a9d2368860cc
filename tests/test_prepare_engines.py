"""scripts/prepare.py: every engine gives the arrays of main.py, to the bit; bad input leaves nothing behind;
main.py trains on them in memory that does not grow with their rows."""

import importlib.util
import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import MAIN, TINY, here, read_json

sys.path.insert(0, str(MAIN.parent / "scripts"))

import prepare as script

from data import TrainBatches, eval_batches, load_dataset
from reclm.config import DataConfig, LossConfig, TrainConfig, build_config
from reclm.data import cache
from reclm.data.cache import read_cache, release
from reclm.data.features import choose_inputs
from reclm.data.histories import read_histories, write_histories
from reclm.data.sources import find_dataset, read_dataset
from reclm.engines import by_spark
from reclm.errors import UserError, run_script
from reclm.run.checkpoint import about_data

NO_SPARK = "pyspark is not installed" if importlib.util.find_spec("pyspark") is None else ""
NO_SPARK = NO_SPARK or ("" if shutil.which("java") else "there is no Java")
needs_spark = pytest.mark.skipif(bool(NO_SPARK), reason=f"{NO_SPARK}: --engine=spark is not tested")
ENGINES = ["pandas", "polars", pytest.param("spark", marks=needs_spark)]
NUMBERS = ["7", "07", "10", "9", "100", "-3", "1e3"]  # as texts, whose order is not that of the numbers
TEXTS = [*NUMBERS, "a", "B", "Z z", "é", "e\u0301", "ü", "中", "\uffff", "𝒳", "null", "x" * 900]


@pytest.fixture(autouse=True)
def small_spark(monkeypatch):
    """As many tasks as there are cores, and a port for nobody."""
    options = "--master local[2] --conf spark.sql.shuffle.partitions=3 --conf spark.ui.enabled=false"
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", f"{options} pyspark-shell")


def arrays_of(engine, files, work, **flags):
    """(meta, arrays) of an engine from files, read from the first to the last."""
    spec = ",".join(map(str, files))
    work.mkdir()
    return script.ENGINES[engine](find_dataset(spec, ""), DataConfig(dataset=spec, **flags), "matching", work)


def assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, array in ours[1].items():
        other = theirs[1][name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert array.tobytes() == other.tobytes(), name


def made_up(seed, rows=400, timed=True, rated=True, texts=True):
    """A table full of ties, of repeated rows and of users who come back to an item."""
    rng = np.random.default_rng(seed)
    users, items = (TEXTS, TEXTS) if texts else (np.arange(5, 25), np.arange(90, 130))
    table = pd.DataFrame({"user": rng.choice(users, rows), "item": rng.choice(items, rows)})
    if rated:
        table["rating"] = rng.choice([0.5, 1, -0.0, 0.0, 5], rows)
    if timed:
        table["timestamp"] = rng.choice([-0.0, 0.0, 60.0, 1.6e9], rows)
    return table.iloc[rng.integers(0, rows, 2 * rows)].reset_index(drop=True)


def write(table, folder, count=1, form="parquet"):
    """The rows in `count` files, cut anywhere. The order of the files is that of their names."""
    folder.mkdir()
    cuts = np.linspace(0, len(table), count + 1).astype(int)
    files = [folder / f"{i:02}.{form}" for i in range(count)]
    for file, first, last in zip(files, cuts, cuts[1:], strict=False):
        part = table.iloc[first:last]
        part.to_parquet(file, index=False) if form == "parquet" else part.to_csv(file, index=False)
    return files


# ---------------------------------------------------------------- the same arrays


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize(
    "kind",
    [{}, {"texts": False}, {"timed": False}, {"rated": False}],
    ids=["text", "numbers", "untimed", "unrated"],
)
def test_engines_agree_with_main(tmp_path, engine, kind):
    """On one file with main.py, and on the same rows in several files."""
    table = made_up(3, **kind)
    (whole,) = write(table, tmp_path / "whole")
    dataset = load_dataset(DataConfig(dataset=str(whole)))
    form = "csv" if kind else "parquet"
    files = write(table, tmp_path / "parts", 5, form)
    found = arrays_of(engine, files, tmp_path / "work")
    assert_same(found, arrays_of("pandas", files, tmp_path / "work2"))
    assert found[0]["fingerprint"] == dataset.fingerprint and found[0]["num_rows"] == dataset.num_rows
    for name in ("offsets", "item_ids", "timestamps", "ratings", "users", "items"):
        assert found[1][name].tobytes() == getattr(dataset, name).tobytes(), name
    assert ("rows equal to an earlier" in " ".join(found[0]["notes"])) == kind.get("timed", True)


IDS = st.one_of(
    st.sampled_from(TEXTS), st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)
)
ROW = st.tuples(IDS, IDS, st.sampled_from([1.0, 2.0, -0.0, 0.0]), st.sampled_from([0, 60, -0.0, 1e9]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROW, min_size=3, max_size=30),
    repeats=st.integers(1, 3),
    columns=st.sampled_from([4, 3, 2]),
    count=st.integers(1, 3),
)
def test_polars_agrees_on_any_table(tmp_path_factory, rows, repeats, columns, count):
    rows = [*rows, *[(rows[0][0], rows[-1][1], 1.0, 60)] * 3] * repeats  # some user has three
    table = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"]).iloc[
        :, [0, 1, 3, 2][:columns]
    ]
    table = table[table["user"].str.strip().ne("") & table["item"].str.strip().ne("")]
    folder = tmp_path_factory.mktemp("any")
    files = write(table, folder / "files", count)
    try:
        ours = arrays_of("pandas", files, folder / "pandas")
    except UserError as error:
        with pytest.raises(UserError) as other:
            arrays_of("polars", files, folder / "polars")
        assert str(other.value) == str(error)
    else:
        assert_same(ours, arrays_of("polars", files, folder / "polars"))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_engines_agree_on_movielens(tmp_path, real, engine):
    raw = read_dataset(find_dataset("ml-1m", real)).interactions
    files = write(raw, tmp_path / "files", 4)
    assert_same(arrays_of(engine, files, tmp_path / "ours"), arrays_of("pandas", files, tmp_path / "theirs"))


@pytest.mark.parametrize("engine", ENGINES)
def test_side_tables_and_chosen_columns(tmp_path, engine):
    table = made_up(5, texts=False).rename(columns={"user": "visitor", "item": "sku"})
    table.to_csv(tmp_path / "shop.csv", index=False)
    (tmp_path / "shop.items.csv").write_text(
        "item,title,genres\n" + "".join(f"{i},Film {i},War\n" for i in range(90, 120))
    )
    (tmp_path / "shop.users.csv").write_text("user,age\n5,30\n6,40\n")
    columns = "user=visitor,item=sku"
    meta, arrays = arrays_of(engine, [tmp_path / "shop.csv"], tmp_path / "work", columns=columns)
    assert arrays["genres"].sum() == 30 and arrays["titles"][-1] == "Film 99" and arrays["profiles"].any()
    assert meta["settings"]["columns"] == columns


# ---------------------------------------------------------------- bad input


def run(*flags, cwd):
    return here(
        *flags,
        cwd=cwd,
        program=lambda: run_script(script.main),
        env={"PYSPARK_SUBMIT_ARGS": os.environ["PYSPARK_SUBMIT_ARGS"]},
    )


def refused(result):
    assert result.code == 2 and len(result.errors) == 1, result.text
    return result.errors[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_row_in_file_17_of_40(tmp_path, engine):
    files = write(made_up(1), tmp_path / "logs", 40, "csv")
    lines = files[17].read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ",soon"
    files[17].write_text("\n".join(lines))
    said = refused(run(f"--engine={engine}", "--input=logs/*.csv", "--out=prepared", cwd=tmp_path))
    assert "logs/17.csv, line 4: timestamp is 'soon'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("engine", ENGINES)
def test_files_with_other_columns(tmp_path, engine):
    files = write(made_up(1), tmp_path / "logs", 3)
    pd.read_parquet(files[2]).drop(columns="rating").to_parquet(files[2])
    said = refused(run(f"--engine={engine}", "--input=logs/*.parquet", "--out=prepared", cwd=tmp_path))
    assert "02.parquet has user, item, timestamp" in said and "give all the same columns" in said
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_nothing_is_left_of_a_full_disk(tmp_path, monkeypatch):
    write(made_up(1), tmp_path / "logs")

    def full(path, array):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    said = refused(run("--input=logs/00.parquet", "--out=prepared", cwd=tmp_path))
    assert "No space left on device" in said and [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_what_only_pandas_knows(tmp_path):
    write(made_up(1), tmp_path / "logs")
    table = made_up(1).assign(label=1)
    table.to_csv(tmp_path / "labels.csv", index=False)
    for flags, said in (
        (["--input=logs/00.parquet", "--min_item_count=2"], "--min_item_count=2 is for --engine=pandas"),
        (["--input=logs/00.parquet", "--task=ctr"], "--task=ctr is for --engine=pandas"),
        (["--input=labels.csv"], "labels.csv has the column label: use --engine=pandas"),
        (["--input=logs/00.parquet", "--lr=1"], "--lr does not concern the preparation"),
        (["--input=logs/00.parquet", "--out=logs"], "exists: choose another name"),
        (["--input=logs/00.parquet", "--out=no/where"], "there is no folder"),
        (["--input=logs/00.parquet", "--engine=dask"], "invalid choice: 'dask'"),
        (["--input=nowhere.csv"], "unknown dataset 'nowhere.csv'"),
    ):
        assert said in refused(run("--engine=polars", "--out=prepared", *flags, cwd=tmp_path))
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("package", ["polars", "pyspark"])
def test_a_missing_extra(tmp_path, monkeypatch, package):
    write(made_up(1), tmp_path / "logs")
    monkeypatch.setitem(sys.modules, package, None)
    engine = package.removeprefix("py")
    said = refused(run(f"--engine={engine}", "--input=logs/00.parquet", "--out=prepared", cwd=tmp_path))
    assert f"{package} is missing: pip install {package}" in said


def test_no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match="apt-get install openjdk-17-jre-headless"):
        by_spark.start_spark(tmp_path)


# ---------------------------------------------------------------- main.py --dataset=prepared/


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with logs/, and prepared/ made of it."""
    folder = tmp_path_factory.mktemp("prepared")
    write(made_up(2, rows=300, texts=False), folder / "logs", 2)
    here("--engine=polars", "--input=logs/*.parquet", "--out=prepared/", cwd=folder, program=script.main).ok()
    return folder


def test_training_on_them_is_training_on_the_files(prepared):
    results = []
    for dataset in ("logs/*.parquet", "prepared/"):
        flags = [f"--dataset={dataset}", *TINY, "--num_epochs=1", f"--out_dir=run{len(results)}"]
        assert "rows equal to an earlier" in here(*flags, cwd=prepared).ok().stdout
        results.append(read_json(prepared / flags[-1].partition("=")[2] / "result.json"))
    for name in ("fingerprint", "valid", "test", "notes", "protocol"):
        assert results[0][name] == results[1][name]
    shown = here("--eval_only=true", "--out_dir=run0", "--dataset=prepared", "--device=cpu", cwd=prepared)
    assert f"{results[0]['test']['NDCG@10']:.4f}" in shown.ok().stdout


def test_other_settings_are_refused(prepared):
    for flag in (
        "--min_item_count=2",
        "--repeats=keep",
        "--shuffle_ties=1",
        "--drop_bad_rows",
        "--cold_items=.1",
        "--columns=user=a,item=b",
        "--positive_label=x",
        "--task=ctr",
    ):
        said = refused(run_main(flag, cwd=prepared))
        assert f"this run has {flag.partition('=')[0]}=" in said and "scripts/prepare.py" in said


def run_main(*flags, cwd):
    import main

    return here("--dataset=prepared", *flags, "--describe", cwd=cwd, program=main.main)


@pytest.mark.parametrize("name", ["meta.json", "item_ids.npy", "users.npy"])
def test_a_changed_folder_is_refused(prepared, tmp_path, name):
    shutil.copytree(prepared / "prepared", tmp_path / "prepared")
    content = bytearray((tmp_path / "prepared" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "prepared" / name).write_bytes(content)
    assert "was changed, or not written to its end" in refused(run_main(cwd=tmp_path))
    (tmp_path / "prepared" / name).unlink()
    assert "was changed, or not written to its end" in refused(run_main(cwd=tmp_path))
    with pytest.raises(UserError, match="is prepared already"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["prepare.py", f"--input={prepared / 'prepared'}", f"--out={tmp_path / 'x'}"]
        )
        script.main()


# ---------------------------------------------------------------- memory


def use(folder, out):
    """All that a training does with the data, but for the model -> peak bytes that it allocated."""
    tracemalloc.start()
    cfg = build_config({"dataset": str(folder)})
    dataset = choose_inputs(load_dataset(cfg.data), cfg)
    batches = TrainBatches(dataset, 50, LossConfig(), TrainConfig())
    for (_, _, _), _ in zip(batches.epoch(0), range(3), strict=False):
        pass
    for _ in zip(eval_batches(dataset, "test", 50, 8), range(3), strict=False):
        pass
    about_data(dataset)
    write_histories(out, dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, dataset


def test_memory_does_not_grow_with_rows(tmp_path, monkeypatch):
    """Ten times the users, with 100 actions each: what is kept per user is less than a number per action."""
    monkeypatch.setattr(cache, "PART", 2**12)
    peaks = []
    for rows in (40_000, 400_000):
        rng = np.random.default_rng(0)
        table = {
            "user": np.arange(rows) % (rows // 100),
            "item": rng.integers(0, 500, rows),
            "timestamp": np.arange(rows),
        }
        file = tmp_path / f"{rows}.parquet"
        pa.parquet.write_table(pa.table(table), file)
        folder = tmp_path / f"prepared{rows}"
        here(f"--input={file}", f"--out={folder}", cwd=tmp_path, program=script.main).ok()
        use(folder, tmp_path / "first.npz")  # what is imported and cached
        peak, dataset = use(folder, tmp_path / f"{rows}.npz")
        peaks.append(peak)
    assert (peaks[1] - peaks[0]) / 360_000 < 3.5, peaks  # bytes per row, 300 per user
    kept = read_histories(tmp_path / "400000.npz")
    assert kept.item_ids.dtype == np.int32 and (kept.item_ids == dataset.item_ids).all()
    assert (kept.timestamps == dataset.timestamps).all() and (kept.users == dataset.users).all()


def test_what_was_read_of_a_memory_map_is_given_back(tmp_path):
    np.save(tmp_path / "long.npy", np.zeros(2**23))
    array, process = np.load(tmp_path / "long.npy", mmap_mode="r"), psutil.Process()
    before = process.memory_info().rss
    assert array.sum() == 0
    assert process.memory_info().rss - before > 2**25
    release(array)
    assert process.memory_info().rss - before < 2**22
    assert array[-1] == 0
    assert read_cache(tmp_path) is None
