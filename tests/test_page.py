"""The page of scripts/serve.py in Chromium: what a person does with it, by mouse and by keyboard, and what it
shows against the Recommender called directly."""

# ruff: noqa: E402 (imports of an extra come after the check that it is there)

import re
import shutil
import signal
import sys
from urllib.parse import urlsplit

import pytest
from launch import MAIN, TINY, Running, here, write_csv

for package, file in (("fastapi", "serve"), ("playwright", "dev"), ("axe_playwright_python", "dev")):
    pytest.importorskip(package, reason=f"pip install -r requirements-{file}.txt")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from reclm.serve import Filters, Recommender

sys.path.insert(0, str(MAIN.parent / "scripts"))
import screenshot

PAGE = MAIN.parent / "reclm" / "serve" / "page.html"
SERVE = MAIN.parent / "scripts" / "serve.py"
NOUNS = ("Harbour", "Orchard", "Lantern", "Station", "Winter")
ADJECTIVES = ("Glass", "Quiet", "Crimson", "Hidden", "Last")
EVIL = "<img src=x onerror=alert(1)>"
EDITS = "performance.getEntriesByName('edit to list').length"
RICH = "--profile_tokens=true --action_embedding=true --time_tokens=embedding --request_time=true".split()


def title(number):
    if number == 24:
        return f"{EVIL} (1984)"
    return f"{ADJECTIVES[number % 5]} {NOUNS[number // 5]}{', The' * (number % 2)} ({1960 + number})"


def shown(number):
    """As the page shows it: the year apart, the article in front"""
    name = title(number)[: -len(" (1960)")]
    return f"The {name.removesuffix(', The')}" if name.endswith(", The") else name


def write_films(folder):
    """A data set of invented films with genres, years and users."""
    write_csv(folder / "films.csv")
    rows = [f'i{n},"{title(n)}",{("Comedy|Drama", "Drama", "Western")[n % 3]}' for n in range(25)]
    (folder / "films.items.csv").write_text("\n".join(["item,title,genres", *rows]) + "\n")
    users = [f"u{n},{'FM'[n % 2]}" for n in range(39)]
    (folder / "films.users.csv").write_text("\n".join(["user,gender", *users]) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = write_films(tmp_path_factory.mktemp("page"))
    here(*TINY, *RICH, "--dataset=films.csv", "--num_epochs=1", "--out_dir=run", cwd=work).ok()
    return work / "run"


@pytest.fixture(scope="module")
def ours(run):
    return Recommender.load(run / "best.pth")


@pytest.fixture(scope="module")
def address(run):
    server = Running(0, f"--out_dir={run}", "--port=0", cwd=run, program=SERVE)
    found = lambda: re.search(r"http://\S+:\d+(?=\n)", server.read(server.out))  # noqa: E731
    server.wait_until(found)
    yield found()[0]
    server.process.send_signal(signal.SIGTERM)
    server.finish()


def test_the_picture_of_the_page(address, tmp_path):  # before `browser`: there is one Playwright at a time
    screenshot.take(address, ("quiet harbour", "quiet orchard"), tmp_path / "docs" / "page.png")
    assert (tmp_path / "docs" / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser, address):
    """A page in a browser of its own, from settings of it. All must end without an error and without a
    request to another host."""
    contexts, said, hosts = [], [], set()

    def make(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        return page

    yield make
    for context in contexts:
        context.close()
    expected = "ERR_INTERNET_DISCONNECTED|status of 40[04]"  # tests that ask for it
    assert [text for text in said if not re.search(expected, text)] == []
    assert hosts <= {urlsplit(address).netloc, ""}


@pytest.fixture
def page(new_page, address):
    page = new_page()
    visit(page, address)
    return page


def visit(page, address):
    page.goto(address)
    expect(page.locator("#list > li").first).to_be_visible()


def titles(page, where):
    return page.locator(f"#{where} > li > div:first-of-type > .title").all_inner_texts()


def change(page, action):
    """Do something that edits, and wait for the list that follows."""
    before = page.evaluate(EDITS)
    action()
    for _ in range(1000):
        if page.evaluate(EDITS) > before:
            return
        page.wait_for_timeout(5)
    raise AssertionError("no new list")


def press(page, name, where="body"):
    return lambda: page.locator(where).get_by_role("button", name=name, exact=True).click()


def add(page, text):
    page.fill("#query", text)
    change(page, lambda: page.keyboard.press("Enter"))


def expected(ours, numbers, ratings=None, filters=None, **more):
    """The titles that the model recommends after these items, oldest first"""
    person = ours.person([f"i{n}" for n in numbers], ratings or [], **more)
    return [shown(int(item.id[1:])) for item in ours.recommend(person, 10, filters or Filters())]


def test_it_is_one_small_file():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 400 and len(text.encode()) <= 30_000
    assert "innerHTML" not in text and not re.findall(r"(?:src|href)=.?https?:", text)


def test_it_teaches_what_to_do(page, ours):
    assert titles(page, "list") == [shown(int(item.id[1:])) for item in ours.popular(10)]
    expect(page.locator("#for-you")).to_have_text("Most used films")
    expect(page.locator("#teach")).to_contain_text("Search a film")
    said = page.locator("#model").inner_text()
    assert ours.about.trained in said and ours.about.protocol in said and " ms in the model" in said


def test_add_rate_move_remove_undo_and_reload(page, ours):
    add(page, "quiet harb")
    assert titles(page, "films") == [shown(1)] == ["The Quiet Harbour"]
    assert titles(page, "list") == expected(ours, [1])
    expect(page.locator("#for-you")).to_have_text("For you")
    add(page, "img src")  # a title that is HTML
    add(page, "1971")
    assert titles(page, "films") == [shown(n) for n in (11, 24, 1)] and EVIL in titles(page, "films")
    assert titles(page, "list") == expected(ours, [1, 24, 11])
    assert page.locator("#list .moved").count() > 0
    change(page, lambda: page.get_by_label("Rating of The Quiet Harbour").select_option("2"))
    assert titles(page, "list") == expected(ours, [1, 24, 11], [2, None, None])
    change(page, press(page, "Move The Quiet Harbour up"))
    assert titles(page, "list") == expected(ours, [24, 1, 11], [None, 2, None])
    change(page, press(page, f"Remove {EVIL}"))
    after = expected(ours, [1, 11], [2, None])
    assert titles(page, "list") == after
    milliseconds = page.evaluate("performance.getEntriesByName('edit to list').map(entry => entry.duration)")
    print(f"\nedit -> list: {', '.join(format(value, '.0f') for value in milliseconds)} ms")
    page.reload()
    expect(page.locator("#films > li")).to_have_count(2)
    expect(page.locator("#list .title")).to_have_text(after)
    assert page.get_by_label("Rating of The Quiet Harbour").input_value() == "2"
    page.go_back()
    expect(page.locator("#films .title")).to_have_text([shown(n) for n in (11, 1, 24)])
    press(page, "Undo")()
    expect(page.locator("#list .title")).to_have_text(expected(ours, [1, 24, 11], [2, None, None]))
    page.go_forward()
    expect(page.locator("#list .title")).to_have_text(expected(ours, [24, 1, 11], [None, 2, None]))


def test_filters(page, ours):
    add(page, "quiet harbour")
    page.locator("#active").click()
    change(page, lambda: page.locator("#genres").get_by_label("Western").check())
    assert titles(page, "list") == expected(ours, [1], filters=Filters(("Western",)))
    expect(page.locator("#few")).to_have_text("No other film passes the filters.")
    page.fill("#from", "1970")
    change(page, lambda: page.keyboard.press("Enter"))
    some = Filters(("Western",), (1970, 1984))
    assert titles(page, "list") == expected(ours, [1], filters=some)
    expect(page.locator("#active")).to_have_text("Filters: 2 in use")
    page.reload()
    expect(page.locator("#list .title")).to_have_text(expected(ours, [1], filters=some))
    page.locator("#active").click()
    change(page, press(page, "Remove all filters"))
    change(page, lambda: page.get_by_label("also films already in my list").check())
    assert titles(page, "list") == expected(ours, [1], filters=Filters(include_seen=True))
    page.fill("#min", "1000")
    change(page, lambda: page.keyboard.press("Enter"))
    expect(page.locator("#few")).to_have_text("No film passes the filters.")
    change(page, press(page, "Remove all filters"))
    page.fill("#k", "3")
    change(page, lambda: page.keyboard.press("Enter"))
    assert titles(page, "list") == expected(ours, [1])[:3]
    page.fill("#from", "1980")
    page.fill("#to", "1970")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("empty range")


def test_why_similar_and_not_interested(page, ours):
    add(page, "quiet harbour")
    add(page, "quiet orchard")
    first = ours.recommend(ours.person(["i1", "i6"]), 10)[0]
    press(page, f"Why {shown(int(first.id[1:]))}?")()
    reasons = ours.why(ours.person(["i1", "i6"]), [first.id], 3)[0]
    expect(page.locator(".why li span:first-child")).to_have_text([shown(int(r.id[1:])) for r in reasons])
    drops = [abs(float(text.replace("−", "-"))) for text in page.locator(".why .fall").all_inner_texts()]
    assert drops == pytest.approx([reason.drop for reason in reasons], rel=0.02)
    press(page, "Similar to The Quiet Harbour")()
    near = [shown(int(item.id[1:])) for item in ours.similar("i1", 5)]
    expect(page.locator(".similar .title")).to_have_text(near)
    change(page, press(page, f"Add {near[0]}", ".similar"))
    assert titles(page, "films")[0] == near[0]
    expect(page.locator(".similar")).to_contain_text("Added")
    refused = titles(page, "list")[0]
    change(page, press(page, f"Not interested in {refused}"))
    assert refused not in titles(page, "list") and len(titles(page, "list")) == 10
    page.locator("#active").click()
    change(page, press(page, f"Allow {refused} again"))
    assert titles(page, "list")[0] == refused


def test_start_from_a_person_or_a_taste(page, ours):
    page.fill("#person", "u3")
    change(page, lambda: page.keyboard.press("Enter"))
    assert len(page.locator("#films > li").all()) == len(ours.user("u3")) == 11
    assert page.get_by_label("gender").input_value() == "M"
    ratings = page.locator("#films select").evaluate_all("all => all.map(one => one.value)")
    assert ratings[::-1] == [str(1 + step % 5) for step in range(11)]
    assert titles(page, "list") == expected(
        ours, [(9 + step) % 25 for step in range(11)], ratings[::-1], profile={"gender": "M"}
    )
    page.locator("#start summary").click()
    change(page, press(page, "Western", "#examples"))
    assert sorted(titles(page, "films")) == sorted(
        shown(int(item.id[1:])) for item in ours.popular(3, Filters(("Western",)))
    )
    change(page, press(page, "Someone at random"))
    assert page.locator("#person").input_value() in ours.histories.users
    page.fill("#person", "nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("'nobody'")


def test_with_the_keyboard_alone(page):
    keys, focus = page.keyboard, lambda: page.evaluate("document.activeElement.ariaLabel")
    box = page.get_by_role("combobox", name="Search 25 films by title")
    keys.press("Tab")
    expect(box).to_be_focused()
    keys.type("quiet")
    expect(box).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#found > [role=option]")).to_have_count(5)
    for key, option in (("ArrowDown", 1), ("ArrowUp", 0), ("ArrowUp", 4), ("Home", 0), ("End", 4)):
        keys.press(key)
        expect(box).to_have_attribute("aria-activedescendant", f"option-{option}")
        expect(page.locator("[aria-selected=true]")).to_have_id(f"option-{option}")
    keys.press("Escape")
    expect(box).to_have_attribute("aria-expanded", "false")
    keys.press("Escape")
    assert box.input_value() == ""
    for text in ("glass harbour", "quiet harbour"):
        keys.type(text)
        change(page, lambda: keys.press("Enter"))
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^10 recommendations\. First: "))
    for _ in range(4):  # over the rating, Similar and ↑
        keys.press("Tab")
    assert focus() == "Move The Quiet Harbour down"
    change(page, lambda: keys.press("Enter"))
    assert titles(page, "films") == ["Glass Harbour", "The Quiet Harbour"]
    assert focus() == "Move The Quiet Harbour down"
    change(page, lambda: keys.press("Alt+ArrowUp"))
    assert titles(page, "films") == ["The Quiet Harbour", "Glass Harbour"]
    change(page, lambda: keys.press("Delete"))
    assert titles(page, "films") == ["Glass Harbour"] and focus() == "Remove Glass Harbour"
    keys.press("Control+z")
    expect(page.locator("#films > li")).to_have_count(2)
    page.locator("#list button").first.focus()
    change(page, lambda: keys.press("Enter"))
    assert len(titles(page, "films")) == 3 and focus().startswith("Add ")


def test_what_a_link_names_and_the_model_does_not_know(new_page, address):
    page = new_page()
    visit(page, f"{address}/#h=i1,9999,i6,%&g=Drama,Opera&r=2,,x&k=abc&y=1970&p.gender=Q")
    expect(page.get_by_role("alert")).to_contain_text("does not know: Q, Opera, 9999, %")
    assert titles(page, "films") == [shown(6), shown(1)]
    assert page.get_by_label("Rating of The Quiet Harbour").input_value() == "2"
    assert page.locator("#from").input_value() == "1970" and page.locator("#k").input_value() == "10"


def test_a_server_that_is_gone_and_comes_back(page, ours):
    add(page, "quiet harbour")
    page.context.set_offline(True)
    press(page, "Remove The Quiet Harbour")()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    expect(page.get_by_role("alert")).to_have_text("")
    expect(page.locator("#for-you")).to_have_text("Most used films")


def test_enter_before_the_results_chooses_among_them(page):
    add(page, "glass")
    page.route("**/items?*", lambda route: page.wait_for_timeout(200) or route.continue_())
    page.fill("#query", "crimson lantern")
    change(page, lambda: page.keyboard.press("Enter"))
    assert titles(page, "films")[0] == shown(12)


def test_items_without_titles(new_page, address):
    page = new_page()

    def plain(route):
        response = route.fetch()
        bare = {"titled": False, "genres": [], "years": None, "users": 0, "dataset": "clicks"}
        route.fulfill(response=response, json=response.json() | bare)

    page.route("**/model", plain)
    visit(page, address)
    expect(page.get_by_role("heading", level=2)).to_have_text(["Your items", "Most used items"])
    page.locator("#active").click()
    expect(page.locator("#min")).to_be_visible()
    assert not any(page.locator(f"#{name}").is_visible() for name in ("genres", "from", "start"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(new_page, address, scheme):
    page = new_page(color_scheme=scheme)
    visit(page, address)
    first = Axe().run(page)
    add(page, "quiet harbour")
    add(page, "glass orchard")
    change(page, lambda: page.locator("#list").get_by_role("button", name="Not interested in").first.click())
    page.locator("#active").click()
    page.locator("#list").get_by_role("button", name="Why").first.click()
    expect(page.locator(".panel")).to_be_visible()
    full = Axe().run(page)
    page.fill("#query", "glass")
    expect(page.locator("#found > [role=option]").first).to_be_visible()
    for results in (first, full, Axe().run(page)):
        assert results.violations_count == 0, results.generate_report()


def test_a_narrow_phone(new_page, address):
    page = new_page(viewport={"width": 320, "height": 640})
    visit(page, f"{address}/#h=i1,i6,i24,i3,i4,i5,i7")
    expect(page.get_by_role("button", name="Show all 7 films")).to_be_visible()
    page.locator("#active").click()
    page.locator("#list").get_by_role("button", name="Why").first.click()
    expect(page.locator(".panel")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    press(page, "Show all 7 films")()
    expect(page.locator("#films > li")).to_have_count(7)
