"""Models on the hub, against a server in a thread that answers as the hub does."""

import base64
import hashlib
import json
import re
import statistics
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import MAIN, TINY, here, read_json, read_state, write_movielens

sys.path.insert(0, str(MAIN.parent / "scripts"))
import model_card
import push_to_hub
from huggingface_hub import constants

from reclm.config import build_config
from reclm.errors import UserError, run_script
from reclm.flags import parse_args
from reclm.serve import Recommender, hub
from reclm.serve.titles import with_titles

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (requirements-serve.txt)")

TOKEN, REPO, SHA = "hf_right", "me/films", "a" * 40
NO_NETWORK = "http://127.0.0.1:9"  # nothing listens there
FILES = {hub.WEIGHTS, hub.ITEMS, hub.SETTINGS, hub.CARD}


class Handler(BaseHTTPRequestHandler):
    """The part of the hub that serves one user, `me`, with one token."""

    protocol_version = "HTTP/1.1"

    def answer(self, code, value=None, body=None, **headers):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.bodies.append(body)
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization', 'me')}/{asked['name']}"
            if repo in self.server.repos:
                return self.answer(409, {"url": f"{self.url()}/{repo}"})
            if not repo.startswith("me/"):
                return self.answer(403, {"error": "You don't have the rights to create a model"})
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos[repo] = {"private": bool(private), "files": {}}
            return self.answer(200, {"url": f"{self.url()}/{repo}"})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.url()}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", path):
            if not found[1].startswith("me/"):
                return self.answer(403, {"error": "forbidden"})
            return self.preupload(body) if found[2] == "preupload" else self.commit(found[1], body)
        return self.answer(404, {"error": path})

    def preupload(self, body):
        modes = [
            {"path": file["path"], "uploadMode": self.server.mode(file["path"]), "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": modes})

    def commit(self, repo, body):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[repo]["files"][line["value"]["path"]] = content
            elif line["key"] == "lfsFile":
                content = self.server.lfs[line["value"]["oid"]]
                self.server.repos[repo]["files"][line["value"]["path"]] = content
        address = f"{self.url()}/{repo}/commit/{SHA}"
        self.answer(200, {"commitUrl": address, "commitOid": SHA, "success": True})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(body)
        self.server.lfs[hashlib.sha256(body).hexdigest()] = body
        self.answer(200, {})

    def do_GET(self):
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        repo = self.server.repos.get((info or file)[1]) if info or file else None
        if repo is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = repo["files"]
        if file:
            content = files[file[2]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, body=content, ETag=etag, X_Repo_Commit=SHA)
        if (info[2] or "").startswith("/tree"):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.answer(200, rows)
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": info[1], "sha": SHA, "private": repo["private"], "siblings": siblings})

    do_HEAD = do_GET

    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch, tmp_path):
    """The server, and a user who is logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.bodies, server.lfs = {}, [], {}
    server.mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another way to upload large files
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with a run on MovieLens-1M in small: profiles, ratings and content."""
    folder = write_movielens(
        tmp_path_factory.mktemp("films"),
        [f"Zebu {i} ({1960 + i})" for i in range(1, 41)],
        ("Wax", "Wax|Dada"),
    )
    inputs = ["--profile_tokens=true", "--action_embedding=true", "--item_features=genres,year,title"]
    here(*TINY, *inputs, "--dataset=ml-1m", "--num_epochs=2", "--out_dir=run", cwd=folder).ok()
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with a run on a file of the user's own, with titles."""
    folder = tmp_path_factory.mktemp("shop")
    rows = [f"u{u},i{(3 * u + t) % 25},{1000 + t}" for u in range(30) for t in range(8)]
    (folder / "clicks.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    items = [f"i{i},Lamp {i},Light" for i in range(25)]
    (folder / "clicks.items.csv").write_text("\n".join(["item,title,genres", *items]) + "\n")
    here(*TINY, f"--dataset={folder}/clicks.csv", "--num_epochs=1", "--out_dir=run", cwd=folder).ok()
    return folder


@pytest.fixture
def written(films, tmp_path):
    """The files of `films`' model."""
    push("--dry_run=model", f"--out_dir={films / 'run'}", cwd=tmp_path).ok()
    return tmp_path / "model"


def push(*flags, cwd, repo=REPO):
    return here(f"--repo={repo}", *flags, cwd=cwd, program=lambda: run_script(push_to_hub.main))


def refused(result):
    """The one line of a refusal."""
    assert result.code == 2 and result.stderr.count("\n") == 1 and not result.stdout, result.text
    return result.errors[0]


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_a_model_comes_back_to_the_last_bit(films, web, mode):
    web.mode = lambda path: mode if path == hub.WEIGHTS else "regular"
    shown = push("--out_dir=run", cwd=films).ok().stdout
    assert f"uploaded to {Handler.url(type('', (), {'server': web}))}/{REPO}" in shown
    assert web.repos[REPO]["files"].keys() == FILES and not web.repos[REPO]["private"]
    theirs = Recommender.load(films / "run" / "best.pth")
    ours = Recommender.load(hub.fetch(REPO))
    assert np.array_equal(ours.engine.table, theirs.engine.table)
    person = {"ratings": [5, None, 2], "profile": {"gender": "F", "age": "25"}}
    mine, yours = (one.recommend(one.person(["3", "7", "9"], **person), 8) for one in (ours, theirs))
    assert [(item.id, item.score) for item in mine] == [(item.id, item.score) for item in yours]
    assert ours.about.trained == theirs.about.trained and ours.about.protocol == theirs.about.protocol
    assert ours.catalogue.counts.tolist() == theirs.catalogue.counts.tolist()
    with pytest.raises(UserError, match="comes without its users"):
        ours.user("1")


def test_what_was_fetched_is_there_without_network(films, web, monkeypatch):
    push("--out_dir=run", cwd=films).ok()
    folder = hub.fetch(REPO)
    monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK)
    assert hub.fetch(REPO) == folder


def test_eval_only_gives_the_same_metrics(films, web, tmp_path):
    push("--out_dir=run", cwd=films).ok()
    data = f"--data_dir={films / 'data'}"
    here("--eval_only=true", f"--from_hub={REPO}", data, cwd=tmp_path).ok()
    (found,) = (tmp_path / "runs" / "hub" / REPO).glob("eval-*.json")
    ours, theirs = read_json(found), read_json(films / "run" / "result.json")
    assert (ours["valid"], ours["test"]) == (theirs["valid"], theirs["test"])


def test_eval_only_refuses_other_data(films, web, tmp_path):
    push("--out_dir=run", cwd=films).ok()
    folder = tmp_path / "data" / "ml-1m"
    folder.mkdir(parents=True)
    for name in ("ratings.dat", "users.dat", "movies.dat"):
        (folder / name).write_bytes((films / "data" / "ml-1m" / name).read_bytes())

    def refusal():
        (line,) = here("--eval_only=true", f"--from_hub={REPO}", "--data_dir=data", cwd=tmp_path).errors
        return line

    (folder / "users.dat").write_text("".join(f"{u}::X::25::1::48067\n" for u in range(1, 61)))
    assert "user table" in refusal()
    rows = (folder / "ratings.dat").read_text().splitlines()
    (folder / "ratings.dat").write_text("\n".join(rows[1:]) + "\n")
    assert "fingerprint" in refusal()


# ---------------------------------------------------------------- what may be published


def test_no_title_genre_or_person_of_movielens_leaves_the_machine(films, web):
    push("--out_dir=run", cwd=films).ok()
    sent = b"".join([*web.bodies, *web.repos[REPO]["files"].values()])
    state = read_state(films / "run" / "best.pth")
    assert state["titles"][0] == "Zebu 1 (1961)" and state["genre_names"][0] == "Wax|Dada"
    for secret in (b"Zebu", b"Wax", b"Dada", b"user_keys", b"histories", str(films).encode()):
        assert secret not in sent
    assert not any(str(key).encode() in sent for key in state["user_keys"].tolist())
    weights = safetensors.load(web.repos[REPO]["files"][hub.WEIGHTS])
    assert not any(name.startswith("content.") for name in weights)


def test_titles_of_movielens_are_refused(films, shop, tmp_path):
    line = refused(push("--with_titles", "--dry_run=m", f"--out_dir={films / 'run'}", cwd=tmp_path))
    assert "MovieLens may not be redistributed" in line
    state = read_state(shop / "run" / "best.pth")
    assert not hub.is_movielens(state)
    for name in ("data/ml-20m/ratings.csv", "ml_latest_small.csv", "MovieLens.parquet", "x/ml-1m.inter"):
        assert hub.is_movielens(state | {"config": state["config"] | {"dataset": name}})
    assert not hub.is_movielens(state | {"config": state["config"] | {"dataset": "html5/xml-1.csv"}})
    assert hub.is_movielens(state | {"items": torch.tensor([1]), "titles": ["Toy Story (1995)"]})


def test_titles_of_own_items_on_request(shop, tmp_path):
    push("--dry_run=bare", f"--out_dir={shop / 'run'}", cwd=tmp_path).ok()
    push("--dry_run=titled", "--with_titles", f"--out_dir={shop / 'run'}", cwd=tmp_path).ok()
    bare, titled = (Recommender.load(tmp_path / name) for name in ("bare", "titled"))
    assert not bare.catalogue.titled and "Lamp" not in (tmp_path / "bare" / hub.ITEMS).read_text()
    assert titled.recommend(["Lamp 3"], 1)[0].title.startswith("Lamp ")
    assert titled.catalogue.genre_names == ["Light"]
    for folder in ("bare", "titled"):  # no path of this machine
        assert str(shop).encode() not in b"".join(f.read_bytes() for f in (tmp_path / folder).iterdir())


def test_titles_are_put_back_by_id(films, written, tmp_path):
    catalogue = Recommender.load(written).catalogue
    table = films / "data" / "ml-1m" / "movies.dat"
    assert with_titles(catalogue, table).number("Zebu 7") == catalogue.number("7")
    (tmp_path / "some.csv").write_text("movieId,title\n7,Gnu\n8,\n99,Yak\n")
    some = with_titles(catalogue, tmp_path / "some.csv")
    assert some.number("gnu") == catalogue.number("7") and some.number("8") == catalogue.number("8")
    (tmp_path / "other.csv").write_text("movieId,title\n99,Yak\n")
    for name, words in (("other.csv", "no title of any item"), ("gone.csv", "does not exist")):
        with pytest.raises(UserError, match=words):
            with_titles(catalogue, tmp_path / name)


def test_people_are_not_published(shop, tmp_path):
    state = read_state(shop / "run" / "best.pth")
    path = tmp_path / "bad.pth"

    def refusal(**changed):
        torch.save(state | changed, path)
        return refused(push("--dry_run=m", f"--ckpt_name={path}", cwd=tmp_path))

    vectors = state["model"] | {"user_embedding.weight": torch.zeros(30, 16)}
    assert "a vector per user" in refusal(model=vectors)
    names = {"name": [f"Ann {i}" for i in range(20)]}
    vocabulary = state["vocabulary"] | {"meanings": {"column name of the user table": "0" * 8}}
    (tmp_path / "m").rmdir()
    line = refusal(values=names, vocabulary=vocabulary)
    assert "'name' of the user table has 20 values for 30 users" in line


# ---------------------------------------------------------------- the card


def test_the_card(films, written):
    text = (written / hub.CARD).read_text()
    _, header, body = text.split("---\n", 2)
    header, result = yaml.safe_load(header), read_json(films / "run" / "result.json")
    assert header["license"] == "other" and header["library_name"] == "toy-reclm"
    (model,) = header["model-index"]
    for split, found in zip(("valid", "test"), model["results"], strict=True):
        for metric in found["metrics"]:
            assert metric["value"] == round(result[split][metric["name"]], 4)
    assert "[More Information Needed]" not in text and "Harper" in body and REPO in body
    for name in (hub.WEIGHTS, hub.ITEMS, hub.SETTINGS):
        assert f"| {name} | `{hashlib.sha256((written / name).read_bytes()).hexdigest()}` |" in body
    assert "--item_features=genres,year,title" in body and "out_dir" not in body


def test_every_number_of_the_card_is_one_of_the_run(films, written):
    """All decimals, and all numbers with a comma or of the sections about the model and its data."""
    body = (written / hub.CARD).read_text().split("---\n", 2)[2]
    result, state = (read_json(films / "run" / "result.json"), read_state(films / "run" / "best.pth"))
    names = [(split, name) for name in ("HR@10", "NDCG@10") for split in ("valid", "test")]
    decimals = re.findall(r"(?<![\d\w])\.\d{4}", body)
    assert decimals == [f"{result[split][name]:.4f}".lstrip("0") for split, name in names]
    size = sum(weight.numel() for weight in state["model"].values())
    rows = sum(6 + u % 9 for u in range(1, 61))
    about = body.partition("## Metrics")[0] + re.search(r"MovieLens-1M: .*", body)[0]
    known = {60, 40, rows, size, 1, 16, 1970}
    numbers = re.findall(r"(?<![\w-])\d[\d,]*(?![\w-])", about)
    assert numbers and {int(n.replace(",", "")) for n in numbers if n.strip(",")} <= known, numbers
    assert f"{result['seconds'] / 60:.1f} minutes" in body and result["commit"] in body


def test_metrics_of_another_epoch_are_not_on_the_card(films, tmp_path):
    best = read_json(films / "run" / "result.json")["best_epoch"]
    other = films / "run" / f"epoch_{1 - best}.pth"
    shown = push("--dry_run=model", f"--ckpt_name={other}", cwd=tmp_path).ok().stdout
    card = (tmp_path / "model" / hub.CARD).read_text()
    (row,) = (row for row in read_state(other)["history"] if row["epoch"] == 1 - best)
    assert "NOTE: no finished run" in shown and card.count("| not measured ") == 2
    assert f"| {row['valid/HR@10']:.4f}".replace("0.", ".") in card
    assert "split: test" not in card


@pytest.fixture(scope="module")
def settings():
    """config -> Published with the settings of a command line, as a run has them."""

    def made(*flags):
        about = model_card.Published({"protocol": "P2: ..."}, Path(), Path(), REPO)
        about.__dict__["config"] = build_config(parse_args(list(flags))).flat() | {"warmup_steps": 100}
        return about

    return made


def test_records_of_the_same_settings_are_found(settings):
    recipe = f"--config={MAIN.parent}/configs/ctr_time.yaml"
    name, records = model_card.best_record(settings(recipe, "--seed=7"))
    assert name == "ctr/time" and [record["seed"] for record in records] == [0, 1, 2]
    scores = [record["test"]["AUC"] for record in records]
    shown = f"{np.mean(scores):.4f} ± {statistics.stdev(scores):.4f}".replace("0.", ".")
    assert model_card.over_seeds(records, "test", "AUC") == shown
    assert model_card.best_record(settings(recipe, "--dropout=.15")) == ("", [])


@pytest.mark.parametrize(
    "flags, run",
    [
        (["--dataset=ml-1m"], ["popularity/p2"]),
        (["--dataset=ml-1m-sasrec", "--dim=32"], ["popularity/p3"]),
        (["--dataset=ml-1m", "--min_item_count=3"], []),
        (["--dataset=ml-1m", "--filter_seen=false", "--exclude_history=false"], []),
    ],
)
def test_popularity_is_of_the_same_protocol(settings, flags, run):
    assert [record["run"] for record in model_card.popularity(settings(*flags))] == run


@pytest.mark.parametrize(
    "flag, kept",
    [
        ("--dataset=/home/ann/secret/clicks.csv", "--dataset=clicks.csv"),
        (r"--dataset=C:\ann\clicks.csv", "--dataset=clicks.csv"),
        ("--item_features=genres,../ann/t.npy", "--item_features=genres,t.npy"),
        ("--config=/home/ann/configs/p3_best.yaml", "--config=configs/p3_best.yaml"),
        ("--lr=3e-3", "--lr=3e-3"),
        ("/home/ann/x.csv", "x.csv"),
    ],
)
def test_commands_keep_file_names_alone(flag, kept):
    assert model_card.without_folders(flag) == kept


# ---------------------------------------------------------------- refusals


def test_refusals_of_the_hub(films, web, monkeypatch):
    assert "this token may not write" in refused(push("--out_dir=run", cwd=films, repo="you/films"))
    web.repos["you/films"] = {"private": False, "files": {}}  # exists, but is not ours
    assert "this token may not write" in refused(push("--out_dir=run", cwd=films, repo="you/films"))
    web.repos[REPO] = {"private": False, "files": {}}
    assert "exists and is public" in refused(push("--out_dir=run", "--private", cwd=films))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses the token" in refused(push("--out_dir=run", cwd=films, repo="me/new"))
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(push("--out_dir=run", cwd=films))
    assert all(repo["files"] == {} for repo in web.repos.values())
    with pytest.raises(UserError, match="no such model on the hub"):
        hub.fetch("me/nothing")


def test_a_private_model(films, web):
    push("--out_dir=run", "--private", "--licence=mit", cwd=films).ok()
    assert web.repos[REPO]["private"]
    assert b"license: mit" in web.repos[REPO]["files"][hub.CARD]


def test_no_network_is_one_line(films, web, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NO_NETWORK)
    assert "the hub cannot be reached" in refused(push("--out_dir=run", cwd=films))
    with pytest.raises(UserError, match="the hub cannot be reached"):
        hub.fetch(REPO)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--repo=films"], "is no name on the hub"),
        (["--dry_run=."], "is not an empty folder"),
        (["--licence=My Own"], "is no name of a licence"),
        (["--ckpt_name=epoch_7.pth"], "no checkpoint epoch_7.pth"),
        (["--licens=mit"], "unrecognized arguments"),
    ],
)
def test_bad_flags(films, flags, words):
    assert words in refused(push("--out_dir=run", *flags, cwd=films))


def rewrite(folder, name, content):
    """Replace a file as somebody would who also corrects its checksum."""
    (folder / name).write_bytes(content)
    settings = read_json(folder / hub.SETTINGS)
    settings["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / hub.SETTINGS).write_text(json.dumps(settings))


def test_damaged_and_foreign_models(films, web):
    push("--out_dir=run", cwd=films).ok()
    weights = bytearray(web.repos[REPO]["files"][hub.WEIGHTS])
    weights[-9] ^= 1
    web.repos[REPO]["files"][hub.WEIGHTS] = bytes(weights)
    folder = hub.fetch(REPO)
    with pytest.raises(UserError, match="model.safetensors is damaged: its checksum"):
        Recommender.load(folder)
    shown = here("--eval_only=true", f"--from_hub={REPO}", cwd=films)
    assert shown.code == 2 and len(shown.errors) == 1 and "its checksum" in shown.errors[0]


@pytest.mark.parametrize(
    "name, change, words",
    [
        (hub.WEIGHTS, lambda old: old[:100], "is damaged"),
        (hub.WEIGHTS, lambda old: safetensors.save({"a": torch.ones(2)}), "does not fit this architecture"),
        (hub.ITEMS, lambda old: b"[]", "is no JSON object"),
        (hub.ITEMS, lambda old: old.replace(b'"ids": [1, ', b'"ids": ['), "disagree"),
        (hub.ITEMS, lambda old: b'{"ids": 7, "counts": []}', "is damaged"),
        (hub.ITEMS, lambda old: b"[" * 100_000, "is damaged"),
    ],
)
def test_files_of_a_stranger(written, name, change, words):
    rewrite(written, name, change((written / name).read_bytes()))
    with pytest.raises(UserError, match=words):
        Recommender.load(written)


def test_settings_of_a_stranger(written):
    path = written / hub.SETTINGS
    good = read_json(path)
    path.write_text(json.dumps(good | {"version": 99}))
    with pytest.raises(UserError, match="another version"):
        Recommender.load(written)
    path.write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(UserError, match="of another program"):
        Recommender.load(written)
    (written / hub.ITEMS).rename(written / "kept")
    with pytest.raises(UserError, match=r"items\.json is missing"):
        Recommender.load(written)
    (written / "kept").rename(written / hub.ITEMS)
    for name in good.keys() - {"ids", "num_rows"}:  # these two are of no effect
        for bad in (None, 7, "x", [], {}, [[]], {"a": {}}, -(10**30)):
            path.write_text(json.dumps(good | {name: bad}))
            try:
                Recommender.load(written)
            except UserError:
                continue
        path.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        if name != "last_time":  # which models that read no times lack
            with pytest.raises(UserError):
                Recommender.load(written)
    for name in good["vocabulary"]:
        for bad in (None, -1, "x", [-5], {"a": "b"}, 10**12):
            path.write_text(json.dumps(good | {"vocabulary": good["vocabulary"] | {name: bad}}))
            try:
                Recommender.load(written).recommend(["3"])
            except UserError:
                continue
