"""The user's own data as people have them: layouts of well-known data sets, formats, times, several files."""

import bz2
import gzip
import json
import re
import subprocess
import sys
import time
import zipfile
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from launch import MAIN, TINY, here
from test_readers import read, rows, write

from data import load_dataset
from reclm.config import DataConfig
from reclm.data.columns import ALIASES, find_column, plain
from reclm.errors import UserError

# Made-up rows in the layout of each data set -> the first row as (user, item, rating or None, time or None).
LAYOUTS = {
    "MovieLens latest": (
        "ratings.csv",
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n",
        ("1", "296", 5.0, 1147880044),
    ),
    "MovieLens 1M": (
        "ratings.dat",
        "1::1193::5::978300760\n1::661::3::978302109\n",
        ("1", "1193", 5, 978300760),
    ),
    "MovieLens 100K": (
        "u.data",
        "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
        ("196", "242", 3, 881250949),
    ),
    "MovieLens 20M": (
        "20m.csv",
        '"userId","movieId","rating","timestamp"\n1,2,3.5,1112486027\n1,29,3.5,1112484676\n',
        ("1", "2", 3.5, 1112486027),
    ),
    "Amazon 2014": (
        "reviews_Beauty_5.json",
        '{"reviewerID": "A1YJ", "asin": "0005019281", "reviewerName": "C", "helpful": [0, 1], "reviewText": '
        '"Good, \\"old\\"", "overall": 4.0, "unixReviewTime": 1203984000, "reviewTime": "x"}\n',
        ("A1YJ", "0005019281", 4.0, 1203984000),
    ),
    "Amazon 2018": (
        "Digital_Music_5.json",
        '{"overall": 5.0, "vote": "3", "verified": true, "reviewerID": "A2T", "asin": '
        '"5555991584", "style": {"Format:": " MP3"}, "unixReviewTime": 1370217600}\n',
        ("A2T", "5555991584", 5.0, 1370217600),
    ),
    "Amazon 2023, rating_only": (
        "Beauty.csv",
        "user_id,parent_asin,rating,timestamp\nAGKH,B00YQ6X8EO,5.0,1588687728923\nAGKH,B1,4.0,1588687728924\n",
        ("AGKH", "B00YQ6X8EO", 5.0, 1588687728.923),
    ),
    "Retailrocket": (
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433224214164,992329,view,248676,\n",
        ("257597", "355908", None, 1433221332.117),
    ),
    "Yoochoose": (
        "yoochoose-clicks.dat",
        "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09.868Z,214536500,0\n",
        ("1", "214536502", None, 1396867869.277),
    ),
    "Last.fm 1K": (
        "userid-timestamp-artid-artname-traid-traname.tsv",
        'u_1\t2009-05-04T23:08:57Z\tf1b1\t"Deep Dish\tab12\tFuck Me Im Famous "Live"\n'
        "u_1\t2009-05-04T13:54:10Z\ta7f7\tx\tcd34\ty\n",
        ("u_1", "ab12", None, 1241478537),
    ),
    "HetRec": (
        "user_taggedartists.dat",
        "userID\tartistID\ttagID\tday\tmonth\tyear\n2\t52\t13\t1\t4\t2009\n2\t52\t15\t1\t4\t2009\n",
        ("2", "52", None, 1238544000),
    ),
    "Gowalla": (
        "loc-gowalla_totalCheckins.txt",
        "0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22847\n0\t2010-10-18T22:17:43Z\t30.26\t-97.76\t420315\n",
        ("0", "22847", None, 1287532527),
    ),
    "Goodbooks-10k": ("ratings.csv", "user_id,book_id,rating\n1,258,5\n2,4081,4\n", ("1", "258", 5, None)),
    "Book-Crossing": (
        "BX-Book-Ratings.csv",
        '"User-ID";"ISBN";"Book-Rating"\r\n"276725";"034545104X";"0"\r\n"276726";"0155\xe9";"5"\r\n'.encode(
            "latin-1"
        ),
        ("276725", "034545104X", 0, None),
    ),
    "KuaiRand": (
        "log_standard.csv",
        "user_id,video_id,date,hourmin,time_ms,is_click,is_like\n0,3784,20220408,1800,1649413846590,1,0\n",
        ("0", "3784", None, 1649413846.590),
    ),
    "KuaiRec": (
        "big_matrix.csv",
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
        "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.27\n",
        ("0", "3649", None, 1593878903.438),
    ),
    "H&M": (
        "transactions_train.csv",
        "t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,000058a1,0663713001,0.05,2\n",
        ("000058a1", "0663713001", None, 1537401600),
    ),
    "RecBole": (
        "ml.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n",
        ("196", "242", 3, 881250949),
    ),
    "S3-Rec": ("Beauty.txt", "1 10 9 8\n2 7 10 3 4 5\n", ("1", "10", None, None)),
    "SASRec": ("mine.txt", "1 10\n1 9\n2 7\n", ("1", "10", None, None)),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts_as_they_are(tmp_path, name):
    file, text, expected = LAYOUTS[name]
    data = read(write(tmp_path / file, text))
    first = data.interactions.iloc[0]
    found = (first["user"], first["item"], first.get("rating"), first.get("timestamp"))
    assert found[:3] == expected[:3]
    assert found[3] == pytest.approx(expected[3], abs=1e-6) if expected[3] else found[3] is None
    assert len(data.interactions) == (8 if name == "S3-Rec" else len(text.splitlines()) - has_header(text))


def has_header(text):
    start = (text if isinstance(text, str) else text.decode("latin-1")).lower()
    return start.startswith(("user", '"user', "timestamp,", "t_dat"))


def test_what_was_taken_as_what_is_said(tmp_path):
    said = {}
    for name, (file, text, _) in LAYOUTS.items():
        said[name] = " ".join(read(write(tmp_path / name / file, text)).notes)
    assert said["MovieLens latest"] == ("ratings.csv is read as: user is userId, item is movieId")
    assert said["Retailrocket"] == (
        "events.csv is read as: user is visitorid, item is itemid; not read: event, transactionid; "
        "timestamps are milliseconds"
    )
    assert "separator ';'" in said["Book-Crossing"] and "latin-1" in said["Book-Crossing"]
    assert "timestamp is time_ms" in said["KuaiRand"] and "milliseconds" in said["KuaiRand"]
    assert "ISO dates" in said["H&M"] and "timestamp is t_dat" in said["H&M"]
    assert "no header" in said["Yoochoose"] and "rows of" in said["S3-Rec"]
    assert "not read: tagID" in said["HetRec"]


# ---------------------------------------------------------------- one table in every form

TABLE = pd.DataFrame(
    {
        "user": ["a", "a", "b", 'ä, "b"'],
        "item": ["007", "7", "x y", "z"],
        "rating": [1.0, 2.5, 3.0, 4.0],
        "timestamp": [1600000000.0, 1600000001.5, 1600000002.0, 1600086400.0],
    }
)


def forms(folder):
    """Yield files with TABLE in every form."""

    def csv(name, **options):
        text = TABLE.to_csv(index=False, **options)
        return write(folder / name, text.encode(options.get("encoding", "utf-8")))

    plain_csv = csv("plain.csv").read_bytes()
    yield folder / "plain.csv"
    yield csv("mine.tsv", sep="\t")
    yield csv("semicolon.csv", sep=";")
    yield csv("pipe.csv", sep="|")
    yield csv("latin.csv", encoding="latin-1")
    yield csv("utf16.csv", encoding="utf-16")
    yield csv("bom.csv", encoding="utf-8-sig")
    yield write(folder / "crlf.csv", plain_csv.replace(b"\n", b"\r\n"))
    yield write(folder / "packed.csv.gz", gzip.compress(plain_csv))
    yield write(folder / "packed.csv.bz2", bz2.compress(plain_csv))
    with pa.CompressedOutputStream(str(folder / "packed.csv.zst"), "zstd") as stream:
        stream.write(plain_csv)
    yield folder / "packed.csv.zst"
    with zipfile.ZipFile(folder / "packed.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.csv", plain_csv)
    yield folder / "packed.csv.zip"
    lines = "".join(json.dumps(row) + "\n" for row in TABLE.to_dict("records"))
    yield write(folder / "lines.jsonl", lines)
    yield write(folder / "lines.json.gz", gzip.compress(lines.encode()))
    yield write(folder / "dotted.csv", plain_csv.replace(b"user,item,rating,", b"User-ID,movieId,Score,"))
    for name, factor in (("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        times = (TABLE.timestamp * factor).astype("int64")
        yield write(folder / f"{name}.csv", TABLE.assign(timestamp=times).to_csv(index=False))
    moments = pd.to_datetime(TABLE.timestamp, unit="s", utc=True)
    yield write(folder / "zone.csv", TABLE.assign(timestamp=moments).to_csv(index=False))
    zurich = moments.dt.tz_convert("Europe/Zurich")
    yield write(folder / "zurich.csv", TABLE.assign(timestamp=zurich).to_csv(index=False))
    yield write(
        folder / "naive.csv",
        TABLE.assign(date=moments.dt.tz_localize(None)).drop(columns="timestamp").to_csv(index=False),
    )
    columns = {"plain": TABLE.timestamp, "moments": moments, "zurich": zurich}
    columns["decimal"] = TABLE.timestamp.map(lambda t: Decimal(str(t)))
    for name, column in columns.items():
        TABLE.assign(timestamp=column, user=TABLE.user.astype("category")).to_parquet(
            folder / f"{name}.parquet"
        )
        yield folder / f"{name}.parquet"


def test_one_table_in_every_form(tmp_path):
    files = list(forms(tmp_path))
    for file in files:
        found = read(file).interactions
        assert set(found) == set(TABLE), file.name
        assert found[list(TABLE)].astype({"user": str, "item": str}).to_numpy().tolist() == (
            TABLE.to_numpy().tolist()
        ), file.name


def test_several_files(tmp_path):
    halves = [TABLE[:2], TABLE[2:]]
    for i, half in enumerate(halves):
        write(tmp_path / f"part{i}.csv", half.to_csv(index=False))
        (tmp_path / "parts").mkdir(exist_ok=True)
        half.to_parquet(tmp_path / "parts" / f"{i}.parquet")
    expected = TABLE.to_numpy().tolist()
    for spec in ("part*.csv", "parts", "part0.csv,part1.csv"):
        parts = [tmp_path / part for part in spec.split(",")]
        data = read(",".join(map(str, parts)))
        assert rows(data) == expected
        assert data.interactions.user.cat.categories.tolist() == sorted(set(TABLE.user))
    write(tmp_path / "part2.csv", "user,item\n1,2\n")
    with pytest.raises(UserError, match="part2.csv has user, item, but .*part0.csv has user, item, rating"):
        read(tmp_path / "part*.csv")


# ---------------------------------------------------------------- columns, labels, bad rows


def test_usual_names_are_written_as_they_are_compared():
    for ours, names in ALIASES.items():
        assert [plain(name) for name in names.split()] == names.split()
        for name in names.split():
            assert find_column(ours, [name.upper()], "a file") == name.upper()
    every = [name for names in ALIASES.values() for name in names.split()]
    assert len(every) == len(set(every))


def test_columns_are_named_by_the_user(tmp_path):
    file = write(tmp_path / "a.csv", "who,what,when,user_id\nx,1,5,9\ny,2,6,9\n")
    data = read(file, columns="user=who, item=what,timestamp=when")
    assert rows(data) == [["x", "1", 5.0], ["y", "2", 6.0]]
    assert "user is who" in data.notes[0] and "not read: user_id" in data.notes[0]
    numbered = write(tmp_path / "b.csv", "x,5,1\ny,6,2\n")
    assert rows(read(numbered, columns="user=1,item=3,timestamp=2")) == rows(data)
    for columns, match in (
        ("user=whom,item=what", "has no column whom; it has: who, what"),
        ("who=user", "'who=user' is not of the form COLUMN=NAME"),
        ("user=who,item", "'item' is not of the form"),
    ):
        with pytest.raises(UserError, match=match):
            read(file, columns=columns)


def test_bad_rows_are_dropped_on_request(tmp_path):
    text = "user,item,rating\na,1,3\n,2,3\nb,,3\nc,3,good\nNULL,4,3\nd,5\ne,6,4,7\nf,7,5\n"
    file = write(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match="a.csv, line 7: 2 fields, expected 3"):
        read(file)
    data = read(file, drop_bad_rows=True)
    assert rows(data) == [["a", "1", 3.0], ["f", "7", 5.0]]
    assert "6 rows with a missing id or a bad value are dropped" in data.notes[-1]
    with pytest.raises(UserError, match="line 3: user is '', expected an id, or --drop_bad_rows=true"):
        read(write(tmp_path / "b.csv", "user,item\na,1\n,2\n"))


def test_labels_in_words(tmp_path):
    file = write(tmp_path / "a.csv", "user,item,label\n1,1,good\n1,2,bad\n1,3,good\n")
    with pytest.raises(
        UserError,
        match="line 2: label is 'good', expected 0 or 1, or name the positive one with --positive_label",
    ):
        read(file)
    assert read(file, positive_label="good").interactions.label.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="--positive_label=fine: the column label has only bad, good"):
        read(file, positive_label="fine")


def test_late_bytes_that_are_not_utf8(tmp_path):
    rows_before = "".join(
        f"{i},{i % 50},{i}\n" for i in range(40_000)
    )  # beyond the first lines that are looked at
    file = write(tmp_path / "a.csv", b"user,item,timestamp\n" + rows_before.encode() + b"caf\xe9,1,5\n")
    data = read(file)
    assert data.interactions.user.iloc[-1] == "café" and "latin-1" in data.notes[0]


def test_a_bad_row_behind_the_first_lines_is_named(tmp_path):
    for bad, match in (("1,2", "2 fields"), ("1,2,x", "timestamp is 'x'"), (",2,3", "user is ''")):
        text = "user,item,timestamp\n" + "1,2,3\n" * 50_000 + bad + "\n" + "1,2,3\n" * 10
        with pytest.raises(UserError, match=f"a.csv, line 50002: {match}"):
            read(write(tmp_path / "a.csv", text))
        with pytest.raises(UserError, match=f"a.csv.gz, line 50002: {match}"):
            read(write(tmp_path / "a.csv.gz", gzip.compress(text.encode())))


@pytest.mark.parametrize("end", ["gz", "bz2", "zst", "zip"])
def test_a_truncated_archive_is_refused(tmp_path, end):
    whole = next(file for file in forms(tmp_path) if file.name == f"packed.csv.{end}").read_bytes()
    with pytest.raises(UserError, match=f"cannot read .*cut.csv.{end}"):
        read(write(tmp_path / f"cut.csv.{end}", whole[:-6]))


# ---------------------------------------------------------------- side tables


def test_side_tables_of_movielens_latest_and_recbole(tmp_path):
    write(tmp_path / "ratings.csv", LAYOUTS["MovieLens latest"][1])
    write(tmp_path / "movies.csv", 'movieId,title,genres\n296,"Pulp, Fiction (1994)",Comedy|Crime\n')
    assert rows_of(read(tmp_path / "ratings.csv").items) == [["296", "Pulp, Fiction (1994)", "Comedy|Crime"]]
    write(tmp_path / "ml.inter", LAYOUTS["RecBole"][1])
    write(
        tmp_path / "ml.item",
        "item_id:token\tmovie_title:token_seq\tgenre:token_seq\n242\tKolya\tA B\n",
    )
    write(tmp_path / "ml.user", "user_id:token\tage:token\n196\t49\n")
    data = read(tmp_path / "ml.inter")
    assert rows_of(data.items) == [["242", "Kolya", "A|B"]]
    assert rows_of(data.users) == [["196", "49"]] and list(data.users) == ["user", "age"]


def rows_of(table):
    return table.to_numpy().tolist()


@pytest.mark.parametrize("genres", ["Action|War", "Action, War", '["Action", "War"]', "['Action', 'War']"])
def test_genres_are_split(tmp_path, genres):
    file = write(tmp_path / "shop.csv", "user,item\n1,7\n")
    table = pd.DataFrame({"asin": ["7"], "price": ["3"], "name": ["Axe"], "category": [genres]})
    write(tmp_path / "shop.items.csv", table.to_csv(index=False))
    items = read(file).items
    assert items.to_dict("records") == [{"item": "7", "title": "Axe", "genres": "Action|War", "price": "3"}]


def test_lists_of_genres_in_json_lines(tmp_path):
    file = write(tmp_path / "shop.jsonl", '{"user": 1, "item": 7}\n')
    write(tmp_path / "shop.items.jsonl", '{"item": 7, "categories": [["Action", "War"]], "title": "Axe"}\n')
    assert read(file).items.genres.tolist() == ["Action|War"]


def test_integers_of_parquet_meet_text_in_side_tables(tmp_path):
    pd.DataFrame({"user": [1, 1, 1], "item": [10, 9, 8], "timestamp": [1, 2, 3]}).to_parquet(
        tmp_path / "a.parquet"
    )
    write(tmp_path / "a.items.csv", "item,title\n9,Nine\n10,Ten\n")
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "a.parquet")))
    assert dict(zip(dataset.items, dataset.titles, strict=True)) == {"10": "Ten", "8": "", "9": "Nine"}


# ---------------------------------------------------------------- as a user sees it


def test_a_table_trains_alike_in_every_form(tmp_path, tiny_csv):
    """CSV with numbers, Parquet of integers, times in milliseconds: the same metrics to the last digit."""
    table = pd.read_csv(tiny_csv)
    table.to_parquet(tmp_path / "ints.parquet")
    write(tmp_path / "text.csv", table.to_csv(index=False))
    seen = table.rename(columns={"user": "visitorid", "item": "itemid"})
    write(
        tmp_path / "ms.csv.gz",
        gzip.compress(
            seen.assign(timestamp=(1_600_000_000 + table.timestamp) * 1000).to_csv(index=False).encode()
        ),
    )
    results = set()
    for file in ("ints.parquet", "text.csv", "ms.csv.gz"):
        here(f"--dataset={file}", *TINY, "--num_epochs=1", f"--out_dir=run-{file}", cwd=tmp_path).ok()
        results.add(str(json.loads((tmp_path / f"run-{file}" / "result.json").read_text())["test"]))
    assert len(results) == 1


def test_a_progress_bar_counts_bytes(tmp_path):
    """Shown on a terminal only, after a second: here the second is taken away and the terminal pretended."""
    file = write(tmp_path / "a.csv", "user,item\n" + "1,2\n" * 100_000)
    code = (
        "import sys, reclm.data.files as f; from pathlib import Path; SHOW = {'delay': 0, 'disable': False}\n"
        "wrap = f.tqdm.wrapattr; f.tqdm.wrapattr = lambda *a, **k: wrap(*a, **k | SHOW)\n"
        "with f.open_bytes(Path(sys.argv[1]), progress=True) as s: s.read()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert "reading a.csv" in done.stderr and "400k" in done.stderr


def test_describe_prints_what_was_understood_and_writes_nothing(tmp_path):
    """Counts compared with those of pandas."""
    rng = np.random.default_rng(0)
    rows = {"user_id": rng.integers(0, 50, 900), "sku": rng.integers(0, 80, 900)}
    table = pd.DataFrame(rows).assign(ts=1_600_000_000 + 3000 * rng.integers(0, 900, 900))
    table.rename(columns={"sku": "product_id"}).to_csv(tmp_path / "shop.csv", index=False)
    shown = here("--dataset=shop.csv", *TINY, "--describe", cwd=tmp_path).ok().stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop.csv"]
    assert "user is user_id, item is product_id, timestamp is ts" in shown
    lengths = table.groupby("user_id").size()
    assert f"{lengths.min()} to {lengths.max()} actions, median {lengths.median():g}" in shown
    table = table.sort_values(["user_id", "ts"], kind="stable")
    gaps = table.groupby("user_id").ts.diff()
    assert f"sessions: {int((gaps.isna() | (gaps > 3600)).sum())}," in shown
    assert f"repeats: {table.duplicated(['user_id', 'sku']).mean():.1%}" in shown
    low, high = (time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in (table.ts.min(), table.ts.max()))
    assert f"times: {low} to {high} UTC" in shown
    assert re.search(rf"10-19 +{int(lengths.between(10, 19).sum())}  #", shown)
    assert re.search(r"to expect: .* per step, .* for all 20 epochs", shown)
    assert "TEST" not in shown


def test_settings_for_own_files_are_refused_elsewhere(tmp_path):
    write(tmp_path / "data/ml-100k/u.data", LAYOUTS["MovieLens 100K"][1])
    for flag in ("--columns=user=user", "--drop_bad_rows", "--positive_label=x"):
        done = here("--dataset=ml-100k", flag, cwd=tmp_path)
        assert done.code == 2 and "is for files of your own" in done.errors[0], done.text
    write(tmp_path / "a.csv", "user,item\n1,2\n")
    done = here("--dataset=a.csv", "--positive_label=x", cwd=tmp_path)
    assert done.errors == ["error: --positive_label has no effect without a column label: leave it out"]


def test_the_documentation_lists_the_usual_names():
    rows = re.findall(r"^\| (\w+) \|([^|]*)\|", (MAIN.parent / "docs/data.md").read_text(), re.MULTILINE)
    names = {ours: text.partition(";")[0].split() for ours, text in rows if ours in ALIASES}
    assert names == {ours: names.split() for ours, names in ALIASES.items()}


def test_spaces_around_ids_do_not_double_the_users(tmp_path):
    data = read(write(tmp_path / "a.csv", "user,item\n a,1\na,2\na , 3\n"))
    assert data.interactions.user.tolist() == ["a"] * 3 and "spaces around ids are removed" in data.notes[0]


def test_numbers_of_json_lines_may_become_fractions(tmp_path):
    lines = "".join(f'{{"user": 1, "item": {i}, "rating": 5}}\n\n' for i in range(200))
    file = write(tmp_path / "a.jsonl", lines + '{"user": 2, "item": 3, "rating": 4.5}\n')
    assert read(file).interactions.rating.iloc[-1] == 4.5
    with pytest.raises(UserError, match="a.jsonl, line 401: user is missing"):
        read(write(tmp_path / "a.jsonl", lines + '{"item": 3, "rating": 4}\n'))
    with pytest.raises(UserError, match="line 401: rating is 'good', of another type"):
        read(write(tmp_path / "a.jsonl", lines + '{"user": 2, "item": 3, "rating": "good"}\n'))
    with pytest.raises(UserError, match="line 401 is not JSON"):
        read(write(tmp_path / "a.jsonl", lines + '{"user": 2, "item": \n'))


def test_line_separators_within_a_text_end_no_line(tmp_path):
    lines = "".join(f'{{"user": {i}, "item": "a\u2028\x85b", "title": "c\u2029d"}}\n' for i in range(3))
    assert read(write(tmp_path / "a.jsonl", lines)).interactions.user.tolist() == ["0", "1", "2"]
    tabs = "u\ta b\tc, d\r\nv\te\tf\tg\n"
    assert rows(read(write(tmp_path / "a.txt", tabs)))[:2] == [["u", "a b"], ["u", "c, d"]]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_rows_of_items_in_any_encoding(tmp_path, encoding):
    """Also where the first byte that is not UTF-8 stands far down."""
    text = "u 1 2 3 4\n" * 40_000 + "v é\nw è\n"
    data = read(write(tmp_path / "a.txt", text.encode(encoding))).interactions
    assert data.item.tolist()[-2:] == ["é", "è"]


def test_a_table_without_a_header_is_not_taken_for_rows_of_items(tmp_path):
    for text in ("1 10 5\n1 11 3\n", "1 10 5 4\n1 11 3 4\n", "1 10 5 2 2020-01-01\n1 11 3 4 2020-01-02\n"):
        with pytest.raises(UserError, match="has no header: number its columns"):
            read(write(tmp_path / "a.txt", text))
    assert len(read(write(tmp_path / "a.txt", "1 2 3 4 5\n2 3 4 5 6\n")).interactions) == 8


def test_a_date_in_three_columns_that_does_not_exist_is_named(tmp_path):
    text = "user,item,year,month,day\n1,2,2009,4,1\n1,3,2009,2,30\n"
    file = write(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match="a.csv, line 3: year, month and day are no date"):
        read(file)
    assert rows(read(file, drop_bad_rows=True)) == [["1", "2", 1238544000.0]]


def test_zip_archives_that_cannot_be_unpacked(tmp_path):
    whole = next(file for file in forms(tmp_path) if file.name == "packed.csv.zip").read_bytes()
    start = whole.index(b"inside.csv") + len("inside.csv")
    damaged = whole[:start] + bytes([whole[start] ^ 0xFF]) + whole[start + 1 :]
    locked = bytearray(whole)
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[whole.index(mark) + flags] |= 1  # encrypted
    for content, match in ((damaged, "cannot read"), (bytes(locked), "password")):
        with pytest.raises(UserError, match=match):
            read(write(tmp_path / "bad.csv.zip", content))
