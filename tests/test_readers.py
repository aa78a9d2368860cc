"""Reading datasets: the user's own tables, bad rows, and the real data where available."""

import re
import sys

import numpy as np
import pandas as pd
import pytest

from reclm.data.sources import find_dataset, read_dataset
from reclm.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(data):
    return data.interactions.to_numpy().tolist()


# ---------------------------------------------------------------- the user's own tables


def test_own_csv_keeps_ids_as_written(tmp_path):
    text = '\ufeffitem,title,user,timestamp\n007,"A, ""B""\nC",NA,1.5\n\n7,,01,2\n'
    source = find_dataset(str(write(tmp_path / "mine.csv", text)), "unused")
    assert (source.name, source.notes) == ("mine", ())
    data = read_dataset(source).interactions
    assert data[["user", "item", "timestamp"]].to_numpy().tolist() == [
        ["NA", "007", 1.5], ["01", "7", 2.0]
    ]  # fmt: skip


def test_own_tsv_without_timestamp_says_so(tmp_path):
    source = find_dataset(str(write(tmp_path / "mine.tsv", "user\titem\n1\t2\n")), "unused")
    assert "file order is taken as time order" in source.notes[0] and "file order" in source.protocol
    assert rows(read_dataset(source)) == [["1", "2"]]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_own_clicks(tmp_path, form):
    text = "split,label,tag,context,user,item\ntrain,1.0,x,007,1,2\ntest,0,x,7,01,2\nvalid,0,x,07,1,3\n"
    file = write(tmp_path / "mine.csv", text)
    if form == "parquet":
        pytest.importorskip("pyarrow")
        table = pd.read_csv(file, dtype={"context": str, "user": str, "item": str, "split": "category"})
        file = tmp_path / "mine.parquet"
        table.to_parquet(file)
    data = read_dataset(find_dataset(str(file), "unused")).interactions
    assert list(data) == ["split", "label", "context", "user", "item"] and data.label.dtype == "int64"
    assert data.to_numpy().tolist() == [
        ["train", 1, "007", "1", "2"], ["test", 0, "7", "01", "2"], ["valid", 0, "07", "1", "3"]
    ]  # fmt: skip


@pytest.mark.parametrize("ids", [["01", "1"], [3, 4], pd.Categorical(["01", "1"])])
def test_own_parquet(tmp_path, ids):
    pytest.importorskip("pyarrow")
    file = tmp_path / "mine.parquet"
    pd.DataFrame({"user": ids, "extra": 0, "item": [5, 6], "timestamp": [1.5, 2]}).to_parquet(file)
    data = read_dataset(find_dataset(str(file), "unused")).interactions
    assert data.user.tolist() == list(ids) and data.item.tolist() == [5, 6]
    assert list(data) == ["user", "item", "timestamp"]


def test_side_tables_keep_all_columns_as_text(tmp_path):
    file = write(tmp_path / "mine.csv", "user,item\n1,2\n")
    write(tmp_path / "mine.users.csv", "user,rating,label,context,split\n1,PG,7,,a\n")
    users = read_dataset(find_dataset(str(file), "unused")).users
    assert users.to_numpy().tolist() == [["1", "PG", "7", "", "a"]]


def test_refused_files(tmp_path, monkeypatch):
    def refused(name, content, match):
        with pytest.raises(UserError, match=match):
            read_dataset(find_dataset(str(write(tmp_path / name, content)), "unused"))

    with pytest.raises(UserError, match="unknown dataset 'ml-2m'.*ml-1m, ml-1m-sasrec"):
        find_dataset("ml-2m", tmp_path)
    refused("a.csv", "user,movie\n1,2\n", "columns are: user, movie")
    refused("b.csv", "user,item,item\n1,2,3\n", "column twice")
    refused("c.csv", "", "is empty")
    refused("d.csv", "user,item\n", "is empty")
    refused("e.csv", b"user,item\n\xff\xfe,2\n", "e.csv.*can't decode")
    refused("f.csv", 'user,item\n1,"2\n', "f.csv, after line")
    refused("i.csv", "user,item,timestamp\n1,2,True\n3,4,True\n", "line 2: timestamp is 'True'")
    refused("g.parquet", "no", "not a parquet file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("h.parquet", "no", "pip install pyarrow")
    refused("ml.xlsx", "", "unknown dataset")


# ---------------------------------------------------------------- bad rows

GOOD = {"user": "1", "item": "2", "rating": "3", "timestamp": "4"}
CLICK = {"label": "1", "context": "07", "split": "valid"}
BAD = {
    "user": ("",),
    "item": ("",),
    "rating": ("good",),
    "timestamp": ("", "nan", "NaN", "noon", "-1", "inf", "1e999", "True"),
    "label": ("", "2", "-1", "0.5", "nan", "True", "yes"),
    "context": ("", " "),
    "split": ("", "1", "eval", "Train", "train "),
}
FORMATS = {  # separator, header, path of the file, name of the dataset
    "1m": ("::", "", "ml-1m/ratings.dat", "ml-1m"),
    "100k": ("\t", "", "ml-100k/u.data", "ml-100k"),
    "recbole": ("\t", "u\ti\tr\tt\n", "ml-100k-recbole/ml-100k.inter", "ml-100k"),
    "csv": (",", ",".join(GOOD) + "\n", "mine.csv", None),
    "tsv": ("\t", "\t".join(GOOD) + "\n", "mine.tsv", None),
    "clicks": (",", ",".join(GOOD | CLICK) + "\n", "clicks.csv", None),
}


def good_row(form):
    return GOOD | CLICK if form == "clicks" else GOOD


def bad_rows(form):
    """(format, fields, what the message names) of every kind of bad row."""
    good = good_row(form)
    yield form, list(good.values())[:-1], "fields, expected"
    yield form, [*good.values(), "5"], "fields, expected"
    for column in good:
        for value in BAD[column]:
            yield form, list((good | {column: value}).values()), f"{column} is '"


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize(("form", "bad", "named"), [row for form in FORMATS for row in bad_rows(form)])
def test_bad_row_is_named(tmp_path, form, bad, named, where):
    sep, header, place, name = FORMATS[form]
    lines = [list(good_row(form).values())] * 3
    lines[where] = bad
    # the blank line checks that lines are counted, not rows
    file = write(tmp_path / place, header + "\n" + "\n".join(map(sep.join, lines)) + "\n")
    line = 2 + where + bool(header)
    with pytest.raises(UserError, match=re.escape(f"{file}, line {line}: ")) as caught:
        read_dataset(find_dataset(name or str(file), tmp_path))
    assert "\n" not in str(caught.value)
    assert named in str(caught.value)


def test_bad_parquet_row_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    good = {"user": ["1", "2"], "item": [1, 2], "rating": [1.0, 2], "timestamp": [1.0, 2]}
    good |= {"label": [1, 0], "context": ["1", "2"], "split": ["train", "test"]}
    bad = {"user": [None, ""], "item": [None, 2.5], "rating": [np.nan, "good"]}
    bad |= {"label": [2, None], "context": [None, " "], "split": [None, "eval"]}
    bad["timestamp"] = [np.nan, -1.0, np.inf, "noon", pd.Timestamp(0)]
    for column, values in bad.items():
        for value in values:
            file = tmp_path / "bad.parquet"
            first = good[column][0] if not isinstance(value, pd.Timestamp) else value
            first = str(first) if isinstance(value, str) else first
            pd.DataFrame({**good, column: [first, value]}).to_parquet(file)
            row = 1 if isinstance(value, pd.Timestamp) else 2
            with pytest.raises(UserError, match=f"bad.parquet, row {row}: {column}"):
                read_dataset(find_dataset(str(file), "unused"))


def test_text_ids_are_refused_where_ids_are_numbers(tmp_path):
    write(tmp_path / "ml-1m/ratings.dat", "1::2::3::4\nx::2::3::4\n")
    with pytest.raises(UserError, match="line 2: user is 'x'"):
        read_dataset(find_dataset("ml-1m", tmp_path))


# ---------------------------------------------------------------- real data


def sizes(table):
    return len(table), table.user.nunique(), table.item.nunique()


def test_real_ml_1m_and_sasrec(real):
    data = read_dataset(find_dataset("ml-1m", real))
    ratings = data.interactions
    assert sizes(ratings) == (1_000_209, 6_040, 3_706)
    assert (len(data.users), len(data.items)) == (6_040, 3_883)
    sasrec = read_dataset(find_dataset("ml-1m-sasrec", real)).interactions
    assert sizes(sasrec) == (999_611, 6_040, 3_416)
    # The same sequences under other names: number users and items as each table first shows them.
    ratings = ratings[ratings.groupby("item").item.transform("size") >= 5]
    ratings = ratings.sort_values(["user", "timestamp"], kind="stable")
    sasrec = sasrec.assign(user=original_users(real)[sasrec.user])
    sasrec = sasrec.sort_values("user", kind="stable")
    assert (sasrec.user.to_numpy() == ratings.user.to_numpy()).all()
    assert (pd.factorize(sasrec.item)[0] == pd.factorize(ratings.item)[0]).all()


def original_users(real):
    """Array from the SASRec file's user id to GroupLens'."""
    pairs = np.loadtxt(real / "ml-1m/sasrec/sas_to_original_users.txt", dtype="int64")
    table = np.zeros(len(pairs) + 1, "int64")
    table[pairs[:, 0]] = pairs[:, 1]
    return table


def test_real_m1(real):
    joined = read_dataset(find_dataset("ml-1m-m1", real)).interactions
    assert sizes(joined) == (995_154, 6_022, 3_043)
    assert joined.timestamp.notna().all()


def test_real_ml_100k(real):
    data = read_dataset(find_dataset("ml-100k", real))
    assert sizes(data.interactions) == (100_000, 943, 1_682)
    assert (len(data.users), len(data.items)) == (943, 1_682)
