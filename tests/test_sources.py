"""Finding and downloading datasets: offline, except for a server on 127.0.0.1."""

import hashlib
import io
import json
import os
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reclm.data import download, readers, sources
from reclm.data.sources import find_dataset, read_dataset
from reclm.errors import UserError

NO_NETWORK = "http://127.0.0.1:9"  # nothing listens on the discard port
RATINGS = "1::10::5::100\n2::10::3::50\n1::7::4::90\n"
ML_1M = {
    "ml-1m/ratings.dat": RATINGS.encode(),
    "ml-1m/users.dat": b"1::F::1::10::04806\n2::M::56::16::70072\n",
    "ml-1m/movies.dat": b"7::Caf\xe9: Two (1990)::Drama\n10::A (1995)::Comedy|War\n",  # latin-1
}
WHEEL = {  # one row per file, two of interactions
    "inter": "user_id:token item_id:token rating:float timestamp:float\n"
    "196 242 3 881250949\n186 302 3 891717742\n",
    "item": "item_id:token movie_title:token_seq release_year:token class:token_seq\n"
    "242 Kolya 1996 Comedy_Drama\n",
    "user": "user_id:token age:token gender:token occupation:token zip_code:token\n196 49 M writer 05105\n",
}
X1 = {
    "train.csv": "user_id,item_id,tag_id,label\n5,20,8,1\n0,10,7,0\n",
    "valid.csv": "label,user_id,item_id,tag_id\n1.0,6.0,10.0,9.0\n",
    "test.csv": "tag_id,item_id,label,user_id\n7,10,0,5\n",
}
X1_PATH = f"/datasets/{download.X1_REPO}/resolve/main"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, as GroupLens (with Range) and the Hugging Face hub do."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        body = self.server.files.get(self.path)
        asked = self.headers.get("Range")
        self.server.log.append((self.command, self.path, asked))
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")  # as the hub answers
            return self.end_headers()
        start = int(re.findall(r"\d+", asked)[0]) if asked and self.server.ranges else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(body[start:][: self.server.cut_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A file server in a thread that GroupLens' url and HF_ENDPOINT lead to."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.log, web.ranges, web.cut_after = {}, [], True, None
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setenv("RECLM_GROUPLENS_URL", url)
    monkeypatch.setenv("HF_ENDPOINT", url)
    yield web
    web.shutdown()
    web.server_close()


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setenv("RECLM_GROUPLENS_URL", NO_NETWORK)
    monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK)

    def failing_pip(args):
        raise UserError("cannot get the wheel (pip sees no network)")

    monkeypatch.setattr(download, "run_pip", failing_pip)


def zipped(files):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def serve_ml_1m(server, monkeypatch, **extra):
    """Offer a small ml-1m.zip with the right checksum; return its bytes."""
    body = zipped({**ML_1M, "ml-1m/README": os.urandom(100_000), "../evil": b"x", **extra})
    server.files["/ml-1m.zip"] = body
    monkeypatch.setitem(download.GROUPLENS_MD5, "ml-1m.zip", hashlib.md5(body).hexdigest())
    return body


def serve_hub(server, monkeypatch, repo, md5, files):
    """Offer `files` as a dataset of the hub, with the right checksums."""
    for name, content in files.items():
        server.files[f"/datasets/{repo}/resolve/main/{name}"] = content.encode()
        monkeypatch.setitem(md5, name, hashlib.md5(content.encode()).hexdigest())


def serve_m1(server, monkeypatch):
    """Three users 1, 2, 10 and three items 5, 50, 6 (as text: 1, 10, 2 and 5, 50, 6), all rated."""
    lists = {"train": [[0], [0], [0]], "validation": [[2], [2], [2]], "test": [[1], [1], []]}
    monkeypatch.setattr(readers, "M1_MIN_COUNT", 2)
    files = {f"{part}_data.json": json.dumps(content) for part, content in lists.items()}
    serve_hub(server, monkeypatch, download.M1_REPO, download.M1_MD5, files)


def serve_x1(server, monkeypatch):
    serve_hub(server, monkeypatch, download.X1_REPO, download.X1_MD5, X1)


def serve_x1_zip(server, monkeypatch):
    serve_x1(server, monkeypatch)
    server.files.clear()
    packed = {"a/train.csv": X1["train.csv"], "a/b/valid.csv": X1["valid.csv"], "test.csv": X1["test.csv"]}
    server.files[f"{X1_PATH}/{download.X1_ARCHIVE}"] = zipped({**packed, "../evil": "x"})


ON_HUB = {  # function that serves it: name, repository and checksums
    serve_m1: ("ml-1m-m1", download.M1_REPO, download.M1_MD5),
    serve_x1: ("movielens-latest-x1", download.X1_REPO, download.X1_MD5),
    serve_x1_zip: ("movielens-latest-x1", download.X1_REPO, download.X1_MD5),
}


def fake_wheel(monkeypatch):
    """Let `run_pip` deliver a small wheel; return the list of the calls that it gets."""
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    files = {f"{folder}.{k}": v.replace(" ", "\t").replace("_D", " D") for k, v in WHEEL.items()}
    body, calls = zipped({**files, "recbole/evil.py": "raise SystemExit"}), []

    def pip(args):
        calls.append(args)
        Path(args[args.index("-d") + 1], "recbole-1.2.1-py3-none-any.whl").write_bytes(body)

    monkeypatch.setattr(download, "run_pip", pip)
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(body).hexdigest())
    return calls


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def visible_files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name[0] != ".")


def rows(data):
    return data.interactions.to_numpy().tolist()


# ---------------------------------------------------------------- GroupLens


def test_download_and_read_ml_1m(server, monkeypatch, tmp_path):
    serve_ml_1m(server, monkeypatch)
    source = find_dataset("ml-1m", tmp_path)
    data = read_dataset(source)
    assert rows(data) == [[1, 10, 5, 100], [2, 10, 3, 50], [1, 7, 4, 90]]  # file order
    assert list(data.interactions) == ["user", "item", "rating", "timestamp"]
    assert data.interactions.dtypes.astype(str).tolist() == ["int64", "int64", "float64", "float64"]
    assert data.users.zip.tolist() == ["04806", "70072"]
    assert data.items.title.tolist() == ["Café: Two (1990)", "A (1995)"]
    assert source.protocol.startswith("P2") and source.notes == ()
    names = ["ml-1m", "ml-1m/movies.dat", "ml-1m/ratings.dat", "ml-1m/users.dat"]
    assert visible_files(tmp_path) == names  # nothing else from the zip, and no part file
    assert not (tmp_path.parent / "evil").exists()
    server.files.clear()
    assert find_dataset(None, tmp_path) == source  # now local: no request
    assert len(server.log) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_killed_download_resumes(server, monkeypatch, tmp_path, ranges):
    body = serve_ml_1m(server, monkeypatch)
    server.cut_after, server.ranges = 70_000, ranges
    with pytest.raises(UserError, match="connection lost after 70,000 of .*run again to resume"):
        find_dataset("ml-1m", tmp_path)
    assert visible_files(tmp_path) == ["ml-1m.zip.part"]
    server.cut_after = None
    data = read_dataset(find_dataset("ml-1m", tmp_path))
    assert len(data.interactions) == 3
    assert server.log[-1] == ("GET", "/ml-1m.zip", "bytes=70000-")
    assert not (tmp_path / "ml-1m.zip.part").exists() and len(body) > 100_000


def test_complete_part_file_is_not_downloaded_again(server, monkeypatch, tmp_path):
    write(tmp_path / "ml-1m.zip.part", serve_ml_1m(server, monkeypatch))
    assert len(read_dataset(find_dataset("ml-1m", tmp_path)).interactions) == 3


def test_wrong_md5_is_refused_and_removed(server, monkeypatch, tmp_path):
    body = serve_ml_1m(server, monkeypatch)
    monkeypatch.setitem(download.GROUPLENS_MD5, "ml-1m.zip", "f" * 32)
    with pytest.raises(UserError) as caught:
        find_dataset("ml-1m", tmp_path)
    assert "f" * 32 in str(caught.value) and hashlib.md5(body).hexdigest() in str(caught.value)
    assert visible_files(tmp_path) == []


def test_killed_extraction_leaves_nothing_that_looks_whole(server, monkeypatch, tmp_path):
    serve_ml_1m(server, monkeypatch)

    def killed(packed, out):
        out.write(packed.read(5))
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", killed)
    with pytest.raises(KeyboardInterrupt):
        find_dataset("ml-1m", tmp_path)
    assert visible_files(tmp_path) == ["ml-1m", "ml-1m.zip.part"]


@pytest.mark.parametrize(("serve", "name"), [(serve_ml_1m, "ml-1m"), (serve_x1, "movielens-latest-x1")])
def test_two_runs_download_once(server, monkeypatch, tmp_path, serve, name):
    serve(server, monkeypatch)
    runs = [threading.Thread(target=find_dataset, args=(name, tmp_path)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    downloads = [path for method, path, _ in server.log if method == "GET" and path in server.files]
    assert sorted(downloads) == sorted(server.files)
    assert visible_files(tmp_path / name)


def test_no_network_says_where_to_put_the_files(no_network, tmp_path):
    with pytest.raises(UserError, match="cannot download http.*refused.*put the files into"):
        find_dataset("ml-1m", tmp_path)


def test_unwritable_data_dir(tmp_path):
    blocked = write(tmp_path / "a_file", "") / "data"
    with pytest.raises(UserError, match="cannot write into"):
        find_dataset("ml-1m", blocked)


# ---------------------------------------------------------------- MovieLens-100K and the automatic


def test_ml_100k_download(server, monkeypatch, tmp_path):
    flags = "|".join("1" if i in (5, 8) else "0" for i in range(19))
    body = zipped(
        {
            "ml-100k/u.data": "196\t242\t3\t881250949\n",
            "ml-100k/u.user": "196|49|M|writer|05105\n",
            "ml-100k/u.item": f"242|Kolya (1996)|24-Jan-1997||http://x|{flags}\n",
        }
    )
    server.files["/ml-100k.zip"] = body
    monkeypatch.setitem(download.GROUPLENS_MD5, "ml-100k.zip", hashlib.md5(body).hexdigest())
    data = read_dataset(find_dataset("ml-100k", tmp_path))
    assert rows(data) == [[196, 242, 3, 881250949]]
    assert data.users.iloc[0].to_dict() == {
        "user": 196, "age": 49, "gender": "M", "occupation": "writer", "zip": "05105"
    }  # fmt: skip
    assert data.items.to_numpy().tolist() == [[242, "Kolya (1996)", "Comedy|Drama"]]


def test_ml_100k_from_the_wheel(no_network, monkeypatch, tmp_path):
    calls = fake_wheel(monkeypatch)
    data = read_dataset(find_dataset("ml-100k", tmp_path))
    assert rows(data) == [[196, 242, 3, 881250949], [186, 302, 3, 891717742]]
    assert data.items.to_numpy().tolist() == [[242, "Kolya (1996)", "Comedy|Drama"]]
    assert data.users.zip.tolist() == ["05105"]
    assert "recbole==1.2.1" in calls[0] and "--no-deps" in calls[0]
    assert [Path(name).name for name in visible_files(tmp_path)] == [
        "ml-100k-recbole", "ml-100k.inter", "ml-100k.item", "ml-100k.user"
    ]  # fmt: skip


def test_wrong_wheel_is_refused(no_network, monkeypatch, tmp_path):
    fake_wheel(monkeypatch)
    monkeypatch.setattr(download, "WHEEL_SHA256", "f" * 64)
    with pytest.raises(UserError, match="wrong checksum of recbole.*" + "f" * 64):
        find_dataset("ml-100k", tmp_path)
    assert visible_files(tmp_path) == []


def test_automatic_order(no_network, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="ml-1m: cannot download.*ml-100k: .*pip sees no network"):
        find_dataset(None, tmp_path)
    calls = fake_wheel(monkeypatch)
    source = find_dataset(None, tmp_path)
    assert (source.name, source.reader) == ("ml-100k", "recbole-100k")
    assert re.search("cannot be downloaded: training on MovieLens-100K instead", source.notes[0])
    assert "refused" in source.notes[0]
    assert len(calls) == 1
    monkeypatch.setattr(sources, "fetch_wheel", None)  # a copy in data_dir comes first
    find_dataset(None, tmp_path)
    write(tmp_path / "ml-100k" / "u.data", "1\t2\t3\t4\n")
    source = find_dataset(None, tmp_path)
    assert source.reader == "grouplens-100k" and "MovieLens-100K" in source.notes[0]
    write(tmp_path / "ml-1m" / "ratings.dat", RATINGS)
    source = find_dataset(None, tmp_path)
    assert (source.name, source.notes) == ("ml-1m", ())
    assert read_dataset(source).users is None  # side tables are optional


def test_run_pip_reports_the_last_line():
    with pytest.raises(UserError, match="pip download .*nonsense"):
        download.run_pip(["nonsense"])


# ---------------------------------------------------------------- other forms of MovieLens-1M


def test_sasrec_file(tmp_path):
    with pytest.raises(UserError, match="pmixer/SASRec.pytorch.*--min_item_count=5"):
        find_dataset("ml-1m-sasrec", tmp_path)
    write(tmp_path / "ml-1m/sasrec/ml-1m.txt", "1 2\n1 1\n2 2\n")
    source = find_dataset("ml-1m-sasrec", tmp_path)
    assert source.protocol.startswith("P3")
    assert rows(read_dataset(source)) == [[1, 2], [1, 1], [2, 2]]
    source.files[0].unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_dataset(source)


M1_RATINGS = (
    "2::6::1::9\n1::50::2::8\n1::5::3::7\n10::5::4::6\n2::5::5::5\n10::50::1::4\n10::6::2::3\n"
    "1::6::3::2\n3::6::4::1\n"  # user 3 has one rating: not in the core
)


def test_m1_from_the_hub_joined_with_ratings(server, monkeypatch, tmp_path):
    serve_m1(server, monkeypatch)
    with pytest.raises(UserError, match=r"not chronological.*need .*ml-1m/ratings\.dat.*--dataset=ml-1m"):
        find_dataset("ml-1m-m1", tmp_path)
    write(tmp_path / "ml-1m/ratings.dat", M1_RATINGS)
    source = find_dataset("ml-1m-m1", tmp_path)
    assert source.files[-1].name == "ratings.dat" and len(source.files) == 4
    expected = [[int(v) for v in line.split("::")] for line in M1_RATINGS.split()[:8]]
    assert rows(read_dataset(source)) == expected
    write(tmp_path / "ml-1m/ratings.dat", M1_RATINGS.replace("2::6::1", "2::50::1"))
    with pytest.raises(UserError, match="is not MovieLens-1M's .ratings differ from ml-1m-m1"):
        read_dataset(source)


def test_m1_lists_are_checked(server, monkeypatch, tmp_path):
    serve_m1(server, monkeypatch)
    write(tmp_path / "ml-1m/ratings.dat", M1_RATINGS)
    source = find_dataset("ml-1m-m1", tmp_path)
    write(source.files[0], "[[1]]")
    with pytest.raises(UserError, match="wrong checksum.*train_data.json"):
        find_dataset("ml-1m-m1", tmp_path)


# ---------------------------------------------------------------- clicks, and trouble with the hub


@pytest.mark.parametrize("serve", [serve_x1, serve_x1_zip])
def test_x1_from_the_hub(server, monkeypatch, tmp_path, serve):
    serve(server, monkeypatch)
    source = find_dataset("movielens-latest-x1", tmp_path)
    data = read_dataset(source).interactions
    assert list(data) == ["user", "item", "label", "context", "split"]
    assert (data.drop(columns="split").dtypes == "int64").all()
    assert data.to_numpy().tolist() == [
        [5, 20, 1, 8, "train"], [0, 10, 0, 7, "train"], [6, 10, 1, 9, "valid"], [5, 10, 0, 7, "test"]
    ]  # fmt: skip
    assert source.protocol == "MovielensLatest_x1: reczoo's own random split 7:2:1, no timestamps"
    assert "no time" in source.notes[0] and "learn from the future" in source.notes[0]
    assert visible_files(tmp_path / "movielens-latest-x1") == sorted(X1)
    monkeypatch.setattr(sources, "fetch_hub", None)  # a copy in data_dir comes first
    assert find_dataset("movielens-latest-x1", tmp_path) == source
    write(source.files[1], "damaged")
    with pytest.raises(UserError, match="wrong checksum of .*valid.csv"):
        find_dataset("movielens-latest-x1", tmp_path)
    write(source.files[1], "user_id,item_id,label\n")
    with pytest.raises(UserError, match="valid.csv needs the columns user_id, .*it has: user_id, item_id"):
        read_dataset(source)


@pytest.mark.parametrize("trouble", ["wrong checksum", "half", "no network"])
@pytest.mark.parametrize("serve", ON_HUB)
def test_hub_download_failures(server, monkeypatch, tmp_path, serve, trouble):
    serve(server, monkeypatch)
    name, repo, md5 = ON_HUB[serve]
    first, *_, last = md5
    if trouble == "wrong checksum":
        monkeypatch.setitem(md5, last, "f" * 32)
        message = f"wrong checksum of {repo}/{last}"
    elif trouble == "half":  # the last file, or the zip, is not there
        server.files.popitem()
        message = rf"cannot download {repo}/[\w.]+ .*put the files into"
    else:
        monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub client waits and retries
        message = f"cannot download {repo}/{first} .*put the files into"  # no second try
    given = []
    if name == "ml-1m-m1":
        given = [str(write(tmp_path / "ml-1m/ratings.dat", M1_RATINGS).relative_to(tmp_path))]
    with pytest.raises(UserError, match=message) as caught:
        find_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path for path in visible_files(tmp_path) if "." in path] == given


@pytest.mark.parametrize("body", [zipped({"a/train.csv": "x"}), b"no zip"])
def test_zip_without_the_files_is_refused(server, monkeypatch, tmp_path, body):
    serve_x1_zip(server, monkeypatch)
    server.files[f"{X1_PATH}/{download.X1_ARCHIVE}"] = body
    with pytest.raises(UserError, match="x1.zip is not a complete zip of train.csv, .*put the files into"):
        find_dataset("movielens-latest-x1", tmp_path)
    assert visible_files(tmp_path / "movielens-latest-x1") == []
