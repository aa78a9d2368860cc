"""The page without a server, opened from a file in Chromium without a network, against the Recommender."""

# ruff: noqa: E402, F401, F811 (imports of an extra come after the check that it is there; fixtures)

import numpy as np
import pytest
from launch import TINY, here

pytest.importorskip("test_page", reason="what tests/test_page.py needs")

from playwright.sync_api import expect
from test_page import add, browser, change, press, pytestmark, shown, titles, write_films

from reclm.errors import UserError
from reclm.serve import Filters, Recommender
from reclm.serve.offline import write_offline_page

MODELS = {
    "plain": [],
    "grown": "--action_embedding=true --position_embedding=true --gated_residuals=true --n_kv_heads=1 "
    "--window=6 --n_layers=2".split(),
    "profile": ["--profile_tokens=true"],
    "ctr": ["--task=ctr", "--ctr_split=random"],
}
ASK = """async asked => {
  const answers = [];
  for (const [path, body] of asked)
    answers.push(await (await fetch(path, { body: body && JSON.stringify(body) })).json());
  return answers;
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    work = write_films(tmp_path_factory.mktemp("offline"))
    for name, flags in MODELS.items():
        tiny = [flag for flag in TINY if name != "ctr" or "negatives" not in flag]
        here(*tiny, *flags, "--dataset=films.csv", "--num_epochs=2", f"--out_dir={name}", cwd=work).ok()
    return work


@pytest.fixture(params=["plain", "grown"])
def opened(request, runs, browser):
    """(the page of a model, the model). It must end without an error and with no request but for the file."""
    checkpoint, file = runs / request.param / "best.pth", runs / f"{request.param}.html"
    assert write_offline_page(checkpoint, file) == file.stat().st_size
    context = browser.new_context(offline=True)
    page, said, requests = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    expect(page.locator("#list > li").first).to_be_visible()
    yield page, Recommender.load(checkpoint)
    context.close()
    assert said == [] and set(requests) == {file.as_uri()}


def test_its_answers_are_those_of_the_model(opened):
    page, ours = opened
    rng = np.random.default_rng(0)
    whole = [f"i{n}" for n in rng.integers(0, 25, 30)]  # the model sees the last 16
    marks = [str(mark) if mark and ours.reads.codes else None for mark in rng.integers(0, 6, 30)]
    actions = [{"id": item, "rating": mark} for item, mark in zip(whole, marks, strict=True)]
    histories = [actions[:n] for n in range(1, 31)]  # one more at a time: what is cached goes on
    histories += [actions[:9], actions[:4] + actions[5:9], actions[9::-1]]  # removed, moved
    filters = {"genres": ["Drama"], "years": [1962, 1981], "exclude": ["i7"], "include_seen": True}
    asked = [["/recommend", {"items": items, "k": 10, "filters": filters}] for items in histories]
    theirs, common = page.evaluate(ASK, asked), []
    same = Filters(("Drama",), (1962, 1981), (ours.catalogue.number("i7"),), include_seen=True)
    for items, answer in zip(histories, theirs, strict=True):
        ids, ratings = zip(*((one["id"], one["rating"]) for one in items), strict=True)
        expected = ours.recommend(ours.person(ids, ratings), 10, same)
        scores = {item["id"]: item["score"] for item in answer["items"]}
        common.append(len(scores.keys() & {item.id for item in expected}) / len(expected))
        error = [abs(scores[item.id] - item.score) for item in expected if item.id in scores]
        assert max(error) < 0.05 * np.ptp([item.score for item in expected]) + 0.05
    assert np.mean(common) >= 0.9


def rounded(weight, largest):
    scales = weight.abs().amax(1, keepdim=True) / largest
    return (weight / scales.clamp(min=1e-30)).round() * scales


def test_the_forward_pass_is_exact(opened):
    """Against torch with the same rounded weights"""
    page, ours = opened
    model, whole = ours.engine.model, [f"i{n}" for n in (3, 9, 14, 2, 20, 7, 11, 4, 4, 19)] * 2
    model.item_embedding.weight.data = rounded(model.item_embedding.weight.data, 127)
    ours.engine.table = model.item_embedding.weight.numpy()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and name != "item_embedding.weight":
            weight.data = rounded(weight.data, 255)
    marks = [str(1 + n % 5) for n in range(20)] if ours.reads.codes else []
    items = [{"id": item, "rating": mark} for item, mark in zip(whole, marks or [None] * 20, strict=True)]
    filters = {"include_seen": True}
    (answer,) = page.evaluate(ASK, [["/recommend", {"items": items, "k": 25, "filters": filters}]])
    expected = ours.recommend(ours.person(whole, marks), 25, Filters(include_seen=True))
    scores = {item["id"]: item["score"] for item in answer["items"]}
    assert scores == pytest.approx({item.id: item.score for item in expected}, abs=1e-4)


def test_reasons_similar_items_and_search(opened):
    page, ours = opened
    whole = [f"i{n}" for n in (3, 9, 14, 2, 20)]
    items = [{"id": item} for item in whole]
    asked = [
        ["/why", {"items": items, "of": ["i5", "i6"]}],
        ["/similar/i4?k=5", None],
        ["/items?k=8&q=the%20qu%C3%ADet", None],
    ]
    why, similar, found = page.evaluate(ASK, asked)
    for given, expected in zip(why["reasons"], ours.why(whole, ["i5", "i6"], 3), strict=True):
        assert {one["id"] for one in given} & {one.id for one in expected} or not expected
        assert [one["drop"] for one in given] == pytest.approx([one.drop for one in expected], abs=0.05)
    assert len({one["id"] for one in similar["items"]} & {one.id for one in ours.similar("i4", 5)}) >= 4
    known = [ours.catalogue.ids[n - 1] for n in ours.catalogue.search("quiet", 8)]
    assert [one["id"] for one in found["items"]] == known


def test_the_story(opened):
    page, ours = opened
    add(page, "quiet harbour")
    add(page, "img src")
    assert titles(page, "films") == [shown(24), shown(1)]
    change(page, press(page, "Move The Quiet Harbour up"))
    listed = titles(page, "list")
    expected = [shown(int(item.id[1:])) for item in ours.recommend(["i24", "i1"], 10)]
    assert len(set(listed) & set(expected)) >= 9
    page.reload()
    expect(page.locator("#films .title")).to_have_text([shown(1), shown(24)])
    expect(page.locator("#list .title")).to_have_text(listed)
    page.go_back()
    expect(page.locator("#films .title")).to_have_text([shown(24), shown(1)])
    page.goto(f"{page.url.partition('#')[0]}#h=i1,nothing&y=1990-1980")
    expect(page.get_by_role("alert")).to_contain_text("does not know: nothing")
    expect(page.get_by_role("alert")).to_contain_text("empty range")


@pytest.mark.parametrize("name, said", [("profile", "profile_tokens=true"), ("ctr", "task=ctr")])
def test_refuses_what_it_cannot_compute(runs, name, said):
    with pytest.raises(UserError, match=said):
        write_offline_page(runs / name / "best.pth", runs / "refused.html")
    assert not (runs / "refused.html").exists()
