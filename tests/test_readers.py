"""Reading datasets: the user's own tables, bad rows, and the real data where available."""

import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from reclm.data.columns import Wishes
from reclm.data.sources import check_size, find_dataset, read_dataset
from reclm.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(data):
    return data.interactions.to_numpy().tolist()


# ---------------------------------------------------------------- the user's own tables


def read(file, **wishes):
    return read_dataset(find_dataset(str(file), "unused"), Wishes(**wishes))


def test_own_csv_keeps_ids_as_written(tmp_path):
    text = '\ufeffitem,title,user,timestamp\n007,"A, ""B""\nC",NA,1.5\n\n7,,01,2\n'
    file = write(tmp_path / "mine.csv", text)
    assert find_dataset(str(file), "unused").name == "mine"
    data = read(file).interactions
    assert data[["user", "item", "timestamp"]].to_numpy().tolist() == [
        ["NA", "007", 1.5], ["01", "7", 2.0]
    ]  # fmt: skip


def test_own_file_without_timestamp_says_so(tmp_path):
    source = find_dataset(str(write(tmp_path / "mine.tsv", "user\titem\n1\t2\n")), "unused")
    data = read_dataset(source)
    protocol, notes = check_size(source, data)
    assert "file order is taken as time order" in notes[0] and "file order" in protocol
    assert rows(data) == [["1", "2"]]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_own_clicks(tmp_path, form):
    text = "split,label,tag,context,user,item\ntrain,1.0,x,007,1,2\ntest,0,x,7,01,2\nDev,0,x,07,1,3\n"
    file = write(tmp_path / "mine.csv", text)
    if form == "parquet":
        table = pd.read_csv(file, dtype={"context": str, "user": str, "item": str, "split": "category"})
        file = tmp_path / "mine.parquet"
        table.to_parquet(file)
    data = read(file).interactions[["split", "label", "context", "user", "item"]]
    assert data.label.dtype == "int64"
    assert data.to_numpy().tolist() == [
        ["train", 1, "007", "1", "2"], ["test", 0, "7", "01", "2"], ["valid", 0, "07", "1", "3"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["01", "1"], ["01", "1"]),
        ([3, 4], ["3", "4"]),
        ([3.0, 4.0], ["3", "4"]),
        (np.array([2**63 + 1, 1], np.uint64), ["9223372036854775809", "1"]),
        (np.array([-(2**63), 2**62 + 1]), ["-9223372036854775808", "4611686018427387905"]),
        ([Decimal("12"), Decimal("7")], ["12", "7"]),
        (pd.Categorical(["01", "1"]), ["01", "1"]),
        (pd.Categorical([10, 9]), ["10", "9"]),
        ([b"x", b"y"], ["x", "y"]),
        (["12.0", "7.0"], ["12", "7"]),
        ([" a", "a "], ["a", "a"]),
        (["1.0", "x"], ["1.0", "x"]),
    ],
)
def test_ids_are_text_whatever_their_type(tmp_path, ids, expected):
    file = tmp_path / "mine.parquet"
    pd.DataFrame({"user": ids, "extra": 0, "item": [5, 6], "timestamp": [1.5, 2]}).to_parquet(file)
    data = read(file).interactions
    assert data.user.tolist() == expected and data.item.tolist() == ["5", "6"]
    assert list(data) == ["user", "item", "timestamp"]
    assert data.user.cat.categories.tolist() == sorted(set(expected))


def test_side_tables_keep_all_columns_as_text(tmp_path):
    file = write(tmp_path / "mine.csv", "user,item\n1,2\n")
    write(tmp_path / "mine.users.csv", "user,rating,label,context,split\n1,PG,7,,a\n")
    assert read(file).users.to_numpy().tolist() == [["1", "PG", "7", "", "a"]]


def test_refused_files(tmp_path):
    def refused(name, content, match):
        with pytest.raises(UserError, match=match) as caught:
            read(write(tmp_path / name, content))
        assert "\n" not in str(caught.value)

    with pytest.raises(UserError, match="unknown dataset 'ml-2m'.*ml-1m, ml-1m-sasrec"):
        find_dataset("ml-2m", tmp_path)
    refused("a.csv", "user,film\n1,2\n", "columns are: user, film; .*--columns=item=NAME")
    refused("b.csv", "user,item,item\n1,2,3\n", "column item twice")
    refused("c.csv", "", "is empty")
    refused("d.csv", "user,item\n", "is empty")
    refused("f.csv", 'user,item\n1,"2\n', "f.csv, after line")
    refused("i.csv", "user,item,timestamp\n1,2,True\n3,4,True\n", "line 2: timestamp is 'True'")
    refused("g.parquet", "no", "not a parquet file")
    refused("ml.csv", b"user\0item", "not a text file")
    refused("ml.xlsx", b"PK\x03\x04 and more", "Excel file: save it as CSV")
    refused("two.csv", "user_id,userId,item\n1,1,2\n", "user_id and userId can both be the user: .*--columns")
    refused("n.csv", "user_id,asin,parent_asin\n1,1,2\n", "asin and parent_asin can both be the item")
    refused("h.csv", "7,8,9\n7,9,1\n", "no header: number its columns.*--columns=user=1.*7,8,9")
    refused(
        "j.csv", "user,item,timestamp\n1,2,2020-01-01\n3,4,5\n3,5,2020-01-02\n", "line 3: timestamp is '5'"
    )
    refused(
        "k.csv",
        "user,item,timestamp\n1,2,1600000000\n3,4,2020-01-01\n3,5,1600000000\n",
        "line 3: timestamp is '2020",
    )
    mixed = "".join(f"1,{i},{t}\n" for i, t in enumerate([1600000000000, 1600000000001, 1600000000]))
    refused(
        "l.csv", "user,item,timestamp\n" + mixed, "line 4: timestamp is '1600000000.0', .*as in other rows"
    )
    refused("m.json", "{'user': 1, 'item': 2}\n", "Python dict, not JSON .single quotes.*ast.literal_eval")
    refused("o.jsonl", '{"user": 1, "item": 2}\n{"user": 1\n', "line 2 is not JSON")
    refused("p.jsonl", "[1, 2]\n", "line 1 is not a JSON object")
    refused("q.jsonl", '{"user": 1, "item": [2, 3]}\n', "item is a list")
    refused("behaviors.tsv", "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N4-1\n", "list of items per row")
    refused("r.txt", "some prose\nin lines of other lengths, here\nand there\n.\n", "is no table")


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
    "split": ("", "1", "eval"),
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
    good = {"user": ["1", "2"], "item": [1, 2], "rating": [1.0, 2], "timestamp": [1.0, 2]}
    good |= {"label": [1, 0], "context": ["1", "2"], "split": ["train", "test"]}
    bad = {"user": [None, ""], "item": [None, 2.5], "rating": [np.nan, "good"]}
    bad |= {"label": [2, None], "context": [None, " "], "split": [None, "eval"]}
    bad["timestamp"] = [np.nan, -1.0, np.inf, "noon"]
    for column, values in bad.items():
        for value in values:
            file = tmp_path / "bad.parquet"
            first = str(good[column][0]) if isinstance(value, str) else good[column][0]
            pd.DataFrame({**good, column: [first, value]}).to_parquet(file)
            with pytest.raises(UserError, match=f"bad.parquet, row 2: {column}"):
                read(file)


def test_parquet_texts_that_are_not_utf8_are_one_line(tmp_path):
    raw = pa.array([b"\xff", b"b"])
    texts = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    for column in (raw, texts):
        file = tmp_path / "a.parquet"
        pa.parquet.write_table(pa.table({"user": column, "item": ["1", "2"]}), file)
        with pytest.raises(UserError, match="a.parquet is damaged .*UTF8"):
            read(file)


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
