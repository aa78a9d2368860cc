"""scripts/serve.py: every answer against the Recommender called directly, every error, limits, signals."""

# ruff: noqa: E402 (imports of an extra come after the check that it is there)

import asyncio
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from launch import MAIN, TINY, Running, here, is_running, write_csv

from reclm.errors import UserError
from reclm.serve import Filters, Recommender

for package, file in (("fastapi", "serve"), ("httpx2", "dev"), ("schemathesis", "dev")):
    pytest.importorskip(package, reason=f"pip install -r requirements-{file}.txt")

import httpx2 as httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from reclm.serve import middleware, service
from reclm.serve.app import HIDDEN, POLICY, ROUTES, make_app
from reclm.serve.service import Limits, Source

SERVE = MAIN.parent / "scripts" / "serve.py"
sys.path.insert(0, str(SERVE.parent))
import serve

HISTORY = [{"id": f"i{i}", "rating": 1 + i % 5, "time": 1000.0 + i} for i in (3, 4, 5, 9)]
IDS = [action["id"] for action in HISTORY]
SMALL = Limits(queue=3, max_sessions=2, max_history=20)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Trained models: rich/ (ratings, profile, times), other/ (the same, another seed) and ctr/"""
    work = tmp_path_factory.mktemp("serve")
    write_csv(work / "films.csv")
    films = [f"i{i},Film {i} ({1950 + i}),{'Drama' if i % 2 else 'Comedy|Drama'}" for i in range(25)]
    (work / "films.items.csv").write_text("\n".join(["item,title,genres", *films]) + "\n")
    users = [f"u{u},{'FM'[u % 2]}" for u in range(39)]
    (work / "films.users.csv").write_text("\n".join(["user,gender", *users]) + "\n")
    rich = "--profile_tokens=true --action_embedding=true --time_tokens=embedding --request_time=true".split()
    for name, flags in (
        ("rich", rich),
        ("other", [*rich, "--seed=1"]),
        ("ctr", ["--task=ctr", "--ctr_split=random"]),
    ):
        tiny = [flag for flag in TINY if name != "ctr" or "negatives" not in flag]
        here(*tiny, "--dataset=films.csv", *flags, "--num_epochs=2", f"--out_dir={name}", cwd=work).ok()
    return work


@pytest.fixture(scope="session")
def ours(runs):
    return Recommender.load(runs / "rich" / "best.pth")


def app_of(path, limits=SMALL, **settings):
    return make_app(Source(path).load(limits), limits, **settings)


@pytest.fixture
def client(runs):
    with TestClient(app_of(runs / "rich" / "best.pth")) as client:
        yield client


@pytest.fixture
def ctr(runs):
    with TestClient(app_of(runs / "ctr" / "best.pth")) as client:
        yield client


def ok(response, status=200):
    assert response.status_code == status, response.text
    return response.json()


def error(response, status, *words):
    """One line of JSON with the id of the request, and nothing of this machine"""
    assert response.status_code == status, response.text
    content = response.json()
    assert content.keys() == {"error", "request_id"}
    assert content["request_id"] == response.headers["x-request-id"]
    assert "\n" not in content["error"] and not re.search(r"Traceback|\.py|/tmp|/home", response.text)
    assert all(word in content["error"] for word in words), content
    return content


def same(items, expected):
    assert [item["id"] for item in items] == [item.id for item in expected] and len(items)
    assert [item["place"] for item in items] == list(range(1, len(items) + 1))
    assert [item["score"] for item in items] == pytest.approx([item.score for item in expected], abs=1e-5)
    assert [(item["title"], item["genres"]) for item in items] == [(i.title, i.genres) for i in expected]


def person_of(ours, actions=HISTORY, **more):
    return ours.person(
        [a["id"] for a in actions], [a["rating"] for a in actions], times=[a["time"] for a in actions], **more
    )


# ---------------------------------------------------------------- the model and its items


def test_the_page_says_what_it_may_load(client):
    response = client.get("/")
    assert (
        response.headers["content-security-policy"] == POLICY and "html" in response.headers["content-type"]
    )
    assert response.content == MAIN.parent.joinpath("reclm/serve/page.html").read_bytes()
    assert client.get("/favicon.ico").status_code == 204


def test_model(client, ours):
    shown = ok(client.get("/model"))
    assert (shown["dataset"], shown["checkpoint"], shown["task"]) == ("films", "best.pth", "matching")
    assert (shown["items"], shown["users"], shown["titled"]) == (25, 40, True)
    assert shown["protocol"] == ours.about.protocol and shown["trained"] == ours.about.trained
    assert shown["reads"] == {
        "ratings": ["1", "2", "3", "4", "5"], "profile": {"gender": ["F", "M"]},
        "times": True, "request_time": True, "max_len": 16,
    }  # fmt: skip
    assert shown["genres"] == ["Comedy", "Drama"] and shown["years"] == [1950, 1974]
    assert shown["limits"] == {"k": 100, "history": 20, "why": 50}


def test_items(client, ours):
    found = ok(client.get("/items", params={"q": "film 1", "k": 4}))["items"]
    numbers = ours.catalogue.search("film 1", 4)
    assert [item["id"] for item in found] == [ours.catalogue.ids[n - 1] for n in numbers] and len(found) == 4
    assert found[0]["count"] == ours.catalogue.counts[numbers[0] - 1] > 0
    most_used = ok(client.get("/items"))["items"]
    assert len(most_used) == 10 and most_used[0]["count"] == max(ours.catalogue.counts)
    listed = ok(client.get("/items", params={"ids": "i7,i3,i7"}))["items"]
    assert [item["title"] for item in listed] == ["Film 7 (1957)", "Film 3 (1953)", "Film 7 (1957)"]
    error(client.get("/items", params={"ids": "i7,nope,none"}), 404, "'nope'")
    error(client.get("/items", params={"ids": ",".join(["i1"] * 21)}), 413, "21", "20")
    error(client.get("/items", params={"q": "x" * 201}), 422, "q: ", "200")


def test_similar(client, ours):
    same(ok(client.get("/similar/i3?k=4"))["items"], ours.similar("i3", 4))
    error(client.get("/similar/Film 3"), 404, "Film 3")  # ids only


# ---------------------------------------------------------------- recommendations


def test_recommend(client, ours):
    profile = {"gender": "F"}
    body = {"items": HISTORY, "k": 5, "profile": profile, "at": 2000}
    answer = ok(client.post("/recommend", json=body))
    same(answer["items"], ours.recommend(person_of(ours, profile=profile, at=2000), 5))
    assert answer["basis"] == "model" and answer["complete"] is True and answer["milliseconds"] > 0
    scores = [item["score"] for item in answer["items"]]
    for change in ({"profile": {}}, {"at": 1010}, {"items": IDS}):
        assert [
            item["score"] for item in ok(client.post("/recommend", json=body | change))["items"]
        ] != scores
    same(ok(client.post("/recommend", json={"items": IDS}))["items"], ours.recommend(IDS))


def test_popular_where_the_history_is_empty(client, ours):
    answer = ok(client.post("/recommend", json={"items": [], "k": 3, "filters": {"genres": ["Comedy"]}}))
    same(answer["items"], ours.popular(3, Filters(genres=("Comedy",))))
    assert answer["basis"] == "popular"


FILTERS = {
    "genres": ({"genres": ["comedy"]}, {"genres": ("Comedy",)}),
    "years": ({"years": [1955, 1960]}, {"years": (1955, 1960)}),
    "exclude": ({"exclude": ["i0", "i1"]}, {"exclude": ("i0", "i1")}),
    "candidates": ({"candidates": ["i0", "i3", "i8"]}, {"candidates": ("i0", "i3", "i8")}),
    "min_count": ({"min_count": 17}, {"min_count": 17}),
    "include_seen": ({"include_seen": True}, {"include_seen": True}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(client, ours, name):
    sent, meant = FILTERS[name]
    meant = {
        key: tuple(map(ours.catalogue.id_number, value)) if key in ("exclude", "candidates") else value
        for key, value in meant.items()
    }
    answer = ok(client.post("/recommend", json={"items": IDS, "k": 25, "filters": sent}))
    same(answer["items"], ours.recommend(IDS, 25, Filters(**meant)))
    assert len(answer["items"]) != len(ours.recommend(IDS, 25)), "the filter changes nothing"
    assert answer["complete"] == (len(answer["items"]) == 25)


def test_why(client, ours):
    body = {"items": HISTORY, "of": ["i10", "i11"]}
    reasons = ok(client.post("/why", json=body))["reasons"]
    expected = ours.why(person_of(ours), ["i10", "i11"], 3)
    assert [[(r["id"], r["title"]) for r in row] for row in reasons] == [
        [(r.id, r.title) for r in row] for row in expected
    ]
    assert any(reasons) and [r["drop"] for row in reasons for r in row] == pytest.approx(
        [r.drop for row in expected for r in row], abs=1e-5
    )
    error(client.post("/why", json=body | {"items": []}), 400, "empty history")
    error(client.post("/why", json=body | {"of": ["i1"] * 11}), 422, "of: ", "10")
    error(client.post("/why", json=body | {"of": ["none"]}), 404, "none")


def test_a_ctr_model(ctr, runs):
    theirs = Recommender.load(runs / "ctr" / "best.pth")
    same(ok(ctr.post("/recommend", json={"items": IDS, "k": 4}))["items"], theirs.recommend(IDS, 4))
    assert ok(ctr.get("/model"))["task"] == "ctr"
    error(ctr.post("/sessions", json={}), 409, "--task=matching")
    error(ctr.get("/sessions/any"), 409, "--task=matching")


# ---------------------------------------------------------------- sessions


def test_a_session_gives_what_the_whole_history_gives(client):
    begun = ok(client.post("/sessions", json={"items": HISTORY[:2], "profile": {"gender": "M"}}), 201)
    where = f"/sessions/{begun['id']}"
    assert begun["length"] == 2 and len(begun["id"]) >= 20
    for length in (3, 4):
        told = {"next_time": 2000.0} if length == 4 else {}
        answer = ok(client.post(f"{where}/actions", json=HISTORY[length - 1] | told | {"k": 6}))
        at = {"at": 2000} if length == 4 else {}
        body = {"items": HISTORY[:length], "profile": {"gender": "M"}, "k": 6} | at
        whole = ok(client.post("/recommend", json=body))
        assert answer.pop("length") == length and answer.keys() == whole.keys()
        assert [item["id"] for item in answer["items"]] == [item["id"] for item in whole["items"]]
        scores = [[item["score"] for item in found["items"]] for found in (answer, whole)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert ok(client.get(where)) == {"id": begun["id"], "length": 4}
    error(client.post(f"{where}/actions", json={"id": "none"}), 404, "none")
    error(client.post(f"{where}/actions", json={"id": "i1", "filters": {"genres": ["Noir"]}}), 400, "Noir")
    error(client.post(f"{where}/actions", json={"id": "i1", "time": 5}), 400, "earlier")
    assert ok(client.get(where))["length"] == 4, "an error leaves the session as it was"
    assert client.delete(where).status_code == 204
    error(client.get(where), 404, "no such session")
    error(client.delete(where), 404, "no such session")


def test_the_least_recently_used_session_ends(client):
    first, second = (ok(client.post("/sessions", json={}), 201)["id"] for _ in range(2))
    assert first != second
    ok(client.get(f"/sessions/{first}"))
    third = ok(client.post("/sessions", json={"items": IDS}), 201)["id"]
    error(client.get(f"/sessions/{second}"), 404)
    assert [ok(client.get(f"/sessions/{key}"))["length"] for key in (first, third)] == [0, 4]


def test_a_session_grows_to_the_limit(client):
    key = ok(client.post("/sessions", json={"items": IDS * 5}), 201)["id"]
    error(client.post(f"/sessions/{key}/actions", json={"id": "i1"}), 413, "21", "20")


def test_no_sessions_among_several_workers(runs):
    client = TestClient(app_of(runs / "rich" / "best.pth", Limits(max_sessions=0)))
    error(client.post("/sessions", json={}), 409, "--workers=1")


# ---------------------------------------------------------------- users


def test_users(client, ours):
    assert len(set(ok(client.get("/users?k=5"))["users"])) == 5
    assert set(ok(client.get("/users?k=100"))["users"]) == {f"u{i}" for i in range(40)}
    shown = ok(client.get("/users/u3?k=4"))
    person = ours.user("u3")
    same(shown["items"], ours.recommend(person, 4))
    assert (
        shown["id"] == "u3" and shown["length"] == len(person) == 11 and shown["profile"] == {"gender": "M"}
    )
    assert [item["id"] for item in shown["history"]] == [ours.catalogue.ids[n - 1] for n in person.items]
    assert [item["rating"] for item in shown["history"]] == [str(1 + step % 5) for step in range(11)]
    assert ok(client.get("/users/u39"))["profile"] == {}
    error(client.get("/users/nobody"), 404, "nobody")


def test_users_are_not_shown_where_they_are_not_offered(runs, tmp_path):
    shutil.copy(runs / "rich" / "best.pth", tmp_path / "alone.pth")  # without histories.npz
    for app in (app_of(runs / "rich" / "best.pth", Limits(users=False)), app_of(tmp_path / "alone.pth")):
        client = TestClient(app)
        assert ok(client.get("/model"))["users"] == 0
        error(client.get("/users"), 404, "no users")
        error(client.get("/users/u3"), 404, "no users")


# ---------------------------------------------------------------- errors

BAD = {
    "no JSON": ("{'a'", 400, "no JSON"),
    "no UTF-8": (b'{"items": ["\xff"]}', 400, ""),
    "deep": ("[" * 100_000, 400, ""),
    "long number": ('{"k": 1' + "0" * 5000 + "}", 400, ""),
    "no object": ("[]", 422, ""),
    "empty": ("", 422, ""),
    "NaN": ('{"items": [{"id": "i1", "rating": NaN}]}', 422, "items.0.rating"),
    "infinity": ('{"items": [], "at": 1e999}', 422, "at: "),
    "number as id": ({"items": ["i1", 3]}, 422, "items.1: "),
    "number as id in an object": ({"items": [{"id": 3}]}, 422, "items.0.id: "),
    "text as k": ({"k": "10"}, 422, "k: "),
    "k too small": ({"k": 0}, 422, "k: "),
    "k too large": ({"k": 101}, 422, "k: "),
    "misspelt": ({"filter": {}}, 422, "filter: "),
    "one year": ({"filters": {"years": [1999]}}, 422, "filters.years: "),
    "years backwards": ({"filters": {"years": [1999, 1990]}}, 400, "empty range"),
    "many candidates": ({"filters": {"candidates": ["i1"] * 10_001}}, 422, "filters.candidates: "),
    "milliseconds": ({"at": 1.7e12}, 422, "at: "),
    "unknown item": ({"items": ["i1", "Film 3"]}, 404, "Film 3"),
    "unknown excluded": ({"filters": {"exclude": ["i1", "x"]}}, 404, "'x'"),
    "unknown genre": ({"filters": {"genres": ["Noir"]}}, 400, "Noir"),
    "unknown rating": ({"items": [{"id": "i1", "rating": 7}]}, 400, "ratings"),
    "unknown profile": ({"items": ["i1"], "profile": {"zip": "1"}}, 400, "zip"),
    "some times": ({"items": ["i1", {"id": "i2", "time": 3}]}, 400, "times"),
    "times backwards": ({"items": HISTORY[::-1]}, 400, "in order"),
    "long history": ({"items": ["i1"] * 21}, 413, "21"),
    "large body": (" " * (1 << 20) + "{}", 413, "1,048,576"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(client, name):
    body, status, word = BAD[name]
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    response = client.post("/recommend", content=content, headers={"Content-Type": "application/json"})
    error(response, status, word)


def test_other_paths_methods_and_types(client):
    error(client.get("/nothing"), 404)
    error(client.get("/recommend"), 405)
    error(client.post("/recommend", data={"items": "i1"}), 422)


def test_an_unexpected_error_is_told_to_the_log_alone(client, caplog, monkeypatch):
    def fail(batch):
        raise RuntimeError("secret in /home/someone/model.py")

    monkeypatch.setattr(client.app.state.service.model.recommender.engine, "hidden", fail)
    told = error(client.post("/recommend", json={"items": IDS}), 500, "internal error")
    assert "secret" not in json.dumps(told)
    entry = next(record for record in caplog.records if record.exc_info)
    assert told["request_id"] in entry.message and "secret" in str(entry.exc_info[1])
    ok(client.post("/recommend", json={"items": []}))


def test_request_ids_and_the_log(client, caplog):
    caplog.set_level(logging.INFO, "reclm.serve")
    response = client.get("/health", headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert re.fullmatch(r"mine-1 GET /health 200 \d+\.\d ms", caplog.messages[-1])
    for bad in ("x" * 65, "two words", b"\xe9"):
        assert re.fullmatch(
            "[0-9a-f]{16}", client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        )
    client.get("/similar/a%0Ab")
    assert "/similar/a b 404" in caplog.messages[-1], "one line"


def test_stopping(client):
    client.app.state.service.stopping = True
    error(client.get("/health"), 503, "stopping")
    error(client.post("/recommend", json={"items": IDS}), 503, "stopping")


def test_metrics(client):
    ok(client.get("/similar/i3"))
    error(client.get("/similar/none"), 404)
    client.get("/none")
    ok(client.post("/sessions", json={}), 201)
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'reclm_requests_total{path="/similar/{item}",status="200"} 1',
        'reclm_requests_total{path="/similar/{item}",status="404"} 1',
        'reclm_requests_total{path="other",status="404"} 1',
        'reclm_request_seconds_bucket{path="/similar/{item}",le="+Inf"} 2',
        'reclm_request_seconds_count{path="/similar/{item}"} 2',
        "reclm_sessions 1", "reclm_queue_length 0", "reclm_model_loads_total 1",
    ):  # fmt: skip
        assert line in lines, line
    counts = [int(line.split()[1]) for line in lines if 'bucket{path="/similar/{item}"' in line]
    assert counts == sorted(counts) and len(counts) == len(middleware.BUCKETS)


# ---------------------------------------------------------------- load


def post(app, count, body):
    """`count` requests at once -> their responses"""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            return await asyncio.gather(*(client.post("/recommend", json=body) for _ in range(count)))

    return asyncio.run(run())


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_full_queue_refuses_and_the_others_are_answered(runs, in_thread):
    app = app_of(runs / "rich" / "best.pth")
    app.state.service.model.in_thread = in_thread
    responses = post(app, 10, {"items": IDS})
    assert sorted(response.status_code for response in responses) == [200] * 3 + [429] * 7
    full = next(response for response in responses if response.status_code == 429)
    error(full, 429, "try again")
    assert full.headers["retry-after"] == "1"
    assert app.state.service.line.length == 0
    assert [response.status_code for response in post(app, 3, {"items": IDS})] == [200] * 3


def test_a_long_call_does_not_block_the_loop(runs):
    app, release = app_of(runs / "rich" / "best.pth"), threading.Event()
    model = app.state.service.model

    def wait(*args):
        assert release.wait(30)
        return []

    model.recommender.why = wait

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            slow = asyncio.create_task(client.post("/why", json={"items": IDS, "of": ["i1"]}))
            while not app.state.service.line.length:
                await asyncio.sleep(0)
            ok(await client.get("/health"))
            ok(await client.post("/recommend", json={"items": IDS}))
            assert not slow.done()
            release.set()
            ok(await slow)

    asyncio.run(run())


def raw(app, *messages, headers=()):
    """The status of a POST whose body comes as these ASGI messages, and then no more"""
    waiting, sent = list(messages), []

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/recommend", "raw_path": b"/recommend", "headers": headers,
        "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("a", 80), "client": ("b", 1),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"] if sent else None


def test_bodies_that_are_slow_or_grow_or_stop(runs, monkeypatch):
    app = app_of(runs / "rich" / "best.pth")
    chunk = {"type": "http.request", "body": b" " * 600_000, "more_body": True}
    assert raw(app, chunk, chunk) == 413
    assert raw(app, chunk, {"type": "http.disconnect"}) is None
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    assert raw(app, chunk) == 408
    text = app.state.metrics.text(app.state.service)
    for status in (408, 413, 499):
        assert f'{{path="other",status="{status}"}} 1' in text


# ---------------------------------------------------------------- --watch


def replace(path, content):
    work = path.with_name("work")
    work.write_bytes(content)
    os.replace(work, path)


def wait_for(condition):
    end = time.time() + 30
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def test_watch(runs, ours, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "POLL_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "reclm.serve")
    path = tmp_path / "best.pth"
    shutil.copy(runs / "rich" / "best.pth", path)
    source = Source(path)
    app = make_app(source.load(SMALL), SMALL, source)
    other = Recommender.load(runs / "other" / "best.pth")

    def said(words):
        return [message for message in caplog.messages if words in message]

    with TestClient(app) as client:
        key = ok(client.post("/sessions", json={"items": IDS}), 201)["id"]
        before = app.state.service.model
        for content in (b"damaged", (runs / "ctr" / "best.pth").read_bytes()):
            count = len(said("not loaded"))
            replace(path, content)
            wait_for(lambda: len(said("not loaded")) > count)  # noqa: B023
            same(ok(client.post("/recommend", json={"items": IDS}))["items"], ours.recommend(IDS))
        assert "truncated" in said("not loaded")[0] and "--task=ctr" in said("not loaded")[1]
        assert app.state.service.model is before and ok(client.get(f"/sessions/{key}"))["length"] == 4
        replace(path, (runs / "other" / "best.pth").read_bytes())
        wait_for(lambda: app.state.service.loads == 2)
        same(ok(client.post("/recommend", json={"items": IDS}))["items"], other.recommend(IDS))
        assert [i.score for i in other.recommend(IDS)] != [i.score for i in ours.recommend(IDS)]
        error(client.get(f"/sessions/{key}"), 404, "another model")
        assert len(said("loaded best.pth: epoch")) == 1 and len(said("not loaded")) == 2


# ---------------------------------------------------------------- the OpenAPI description


@pytest.fixture(scope="session")
def operations(runs):
    """{"POST /recommend": ...}"""
    limits = Limits(max_sessions=10, max_history=20)
    found = schemathesis.openapi.from_asgi("/openapi.json", app_of(runs / "rich" / "best.pth", limits))
    return {operation.ok().label: operation.ok() for operation in found.get_all_operations()}


DOCUMENTED = [f"{method} {path.replace(':path', '')}" for method, path, _, about in ROUTES if about != HIDDEN]


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("label", DOCUMENTED)
def test_the_description_is_true(operations, label, mode):
    """No 5xx, no answer that it does not name, and no request accepted that it forbids. What it allows may be
    refused: it does not know which genres there are."""
    if mode.is_negative and label in ("GET /model", "GET /sessions/{key}", "DELETE /sessions/{key}"):
        return  # any text is a key

    @settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operations[label].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


# ---------------------------------------------------------------- scripts/serve.py


def started(folder, *flags):
    server = Running(0, "--ckpt_name=rich/best.pth", "--port=0", *flags, cwd=folder, program=SERVE)
    shown = lambda: server.read(server.out)  # noqa: E731
    server.wait_until(lambda: re.search(r"http://\S+:\d+\n", shown()))
    return server, int(re.search(r":(\d+)\n", shown())[1])


def test_a_server_until_it_is_stopped(runs):
    """Kept connections; SIGTERM while a request is half sent and another connection idle"""
    server, port = started(runs)
    with pytest.raises(UserError, match=f"port {port} .*in use"):
        serve.listen("127.0.0.1", port)
    kept, idle = (http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(2))
    for _ in range(2):
        for connection in (kept, idle):
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200 and response.read() and connection.sock is not None
    body = json.dumps({"items": IDS}).encode()
    kept.putrequest("POST", "/recommend")
    for header in (
        ("Content-Type", "application/json"),
        ("Content-Length", len(body)),
        ("Expect", "100-continue"),
    ):
        kept.putheader(*header)
    kept.endheaders()
    assert kept.sock.recv(100).startswith(b"HTTP/1.1 100")
    os.kill(server.process.pid, signal.SIGTERM)
    wait_for(lambda: idle.sock.recv(1) == b"")  # closed: the server stops
    kept.send(body)
    response = kept.response_class(kept.sock, method="POST")
    response.begin()
    assert response.status == 200 and len(json.loads(response.read())["items"]) == 10
    result = server.finish(30)
    assert result.code == 0, result.text
    assert "POST /recommend 200" in result.stderr and "Traceback" not in result.text


def test_workers_end_together(runs):
    server, port = started(runs, "--workers=2")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/sessions", "{}", {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 409 and b"--workers=1" in response.read()
    server.wait_until(lambda: server.read(server.err).count(" serving ") == 2)
    pids = {int(pid) for pid in re.findall(r"process (\d+)", server.read(server.err))}
    assert len(pids) == 2
    os.kill(pids.pop(), signal.SIGKILL)
    result = server.finish(30)
    assert result.code == 2 and len(result.errors) == 1 and "a worker has ended" in result.errors[0]
    assert not any(map(is_running, pids))


def run(*flags, cwd):
    """main() of the script -> its UserError"""
    with pytest.raises(UserError) as found:
        here(*flags, cwd=cwd, program=serve.main)
    return str(found.value)


def test_bad_flags(runs):
    assert "no checkpoint none.pth in rich" in run("--out_dir=rich", "--ckpt_name=none.pth", cwd=runs)
    assert "is not an export" in run("--ckpt_name=rich", cwd=runs)
    assert "0 to 65535" in run("--port=70000", cwd=runs)
    assert "cannot listen at no.such.host.invalid" in run(
        "--out_dir=rich", "--host=no.such.host.invalid", cwd=runs
    )


def test_a_missing_extra_is_one_line(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install -r requirements-serve.txt" in run("--out_dir=rich", "--port=0", cwd=runs)


def test_an_open_address_is_warned_of(capsys):
    serve.warn(SimpleNamespace(no_users=False), "127.0.0.1")
    serve.warn(SimpleNamespace(no_users=False), "::1")
    assert capsys.readouterr().err == ""
    serve.warn(SimpleNamespace(no_users=False), "0.0.0.0")
    assert re.match("WARNING: there is no authentication.*histories", capsys.readouterr().err)
    serve.warn(SimpleNamespace(no_users=True), "::")
    assert "histories" not in capsys.readouterr().err


def test_connections_send_at_once():
    """asyncio sets TCP_NODELAY for sockets whose protocol is TCP; without it kept connections take 40 ms."""
    with serve.listen("127.0.0.1", 0) as made:
        assert made.proto == socket.IPPROTO_TCP


def test_the_package_is_imported_without_fastapi():
    code = "import sys; import reclm.serve; assert not {'fastapi', 'pydantic', 'torch'} & sys.modules.keys()"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
