"""Recommender, its catalogue, filters, sessions and explanations, against brute force and the whole model."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_incremental import BLOCKS, MAX_LEN, NUM_ITEMS, ROWS, build

from reclm.errors import UserError
from reclm.serve import Catalogue, Filters, Person, Recommender
from reclm.serve.about import About
from reclm.serve.catalogue import names_of, plain
from reclm.serve.person import Reads, make_batch
from reclm.serve.top_k import score_items, top_k
from reclm.serve.trained import TorchEngine

GENRES = ["Crime", "Drama", "Comedy|Crime", "", "Drama|War"]
FILMS = {
    "1": "Toy Story (1995)",
    "6": "Heat (1995)",
    "7": "Sabrina (1995)",
    "915": "Sabrina (1954)",
    "2571": "Matrix, The (1999)",
    "58": "Postino, Il (The Postman) (1994)",
    "260": "Star Wars: Episode IV - A New Hope (1977)",
    "1196": "Star Wars: Episode V - The Empire Strikes Back (1980)",
    "1175": "Delicatessen (1991)",
    "47": "Seven (Se7en) (1995)",
    "2144": "Sixteen Candles (1984)",
    "1207": "Léon: The Professional (a.k.a. The Professional) (1994)",
}


def films():
    counts = np.arange(len(FILMS), 0, -1)
    genres = (GENRES * len(FILMS))[: len(FILMS)]
    return Catalogue(FILMS, FILMS.values(), genres, counts)


def make_recommender(**settings) -> Recommender:
    """A recommender of a random model with NUM_ITEMS items, of ids 100, 101, ..."""
    model = build(**settings)
    cfg = model.cfg
    years = [1980 + number % 20 for number in range(NUM_ITEMS)]
    catalogue = Catalogue(
        range(100, 100 + NUM_ITEMS),
        [f"Film number {number} ({year})" for number, year in enumerate(years)],
        (GENRES * NUM_ITEMS)[:NUM_ITEMS],
        np.arange(NUM_ITEMS) % 7,
    )
    reads = Reads(
        max_len=cfg.max_len,
        times=cfg.model_name == "hstu" or cfg.time_tokens != "none",
        request_time=cfg.request_time,
        default_time=1e9,
        codes={"actions": ["1", "2", "3", "4", "5"]} if cfg.action_embedding else {},
        profile={"gender": ["F", "M"], "age": ["0", "18", "25"]} if cfg.profile_tokens else {},
        vector_per_user=cfg.user_embedding == "explicit",
    )
    about = About({"task": cfg.task}, "made", "none", "never")
    return Recommender(TorchEngine(model), catalogue, reads, about)


def somebody(recommender, length, seed=0, first=0):
    """A person with all that the model reads."""
    rng, reads = np.random.default_rng(seed), recommender.reads
    times = 1e9 + rng.integers(0, 8000, 200).cumsum().astype(float)
    return Person(
        rng.integers(1, NUM_ITEMS + 1, 200)[first:length],
        times[first:length] if reads.times else np.zeros(0),
        {name: rng.integers(0, 6, 200)[first:length] for name in reads.codes},
        np.array([2, 3])[: len(reads.profile)],
        at=times[length] if reads.times else None,
        user=1,
    )


def scores_of(recommender, person):
    """(V,) by the whole model, one person at a time"""
    batch = make_batch([person], recommender.reads)
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.inference_mode():
        return recommender.engine.model(batch)[0].numpy()


# ---------------------------------------------------------------- titles


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("Toy Story (1995)", "1"),
        ("toy story", "1"),
        ("TOY STORY 1995", "1"),
        ("6", "6"),
        ("The Matrix", "2571"),
        ("Matrix, The (1999)", "2571"),
        ("matrix", "2571"),
        ("  the matrix (1999) ", "2571"),
        ("Il Postino", "58"),
        ("the postman", "58"),
        ("Se7en", "47"),
        ("Sabrina (1954)", "915"),
        ("Leon: the professional", "1207"),
        ("The Professional", "1207"),
        ("star wars episode iv a new hope", "260"),
    ],
)
def test_a_title_is_found_as_people_write_it(text, item):
    catalogue = films()
    assert catalogue.ids[catalogue.number(text) - 1] == item


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Heet", ["'Heet'", "Heat (1995)"]),
        ("star war", ["Star Wars: Episode IV", "Star Wars: Episode V"]),
        ("Sabrina", ["Sabrina (1995) (id 7)", "Sabrina (1954) (id 915)", "give the year"]),
        ("", ["closest"]),
        ("999999", ["'999999'"]),
        ("x" * 10**6, ["closest"]),
        ("(" * 1000, ["closest"]),
    ],
)
def test_an_unknown_title_names_the_closest(text, named):
    with pytest.raises(UserError) as caught:
        films().number(text)
    assert all(name in str(caught.value) for name in named), caught.value
    assert str(caught.value).count(";") == (1 if "may be" in str(caught.value) else 2)
    assert len(str(caught.value)) < 400


def test_names():
    assert plain("Matrix, The") == plain("The MATRIX") == "matrix"
    assert plain("The") == "the" and plain("Eye for an Eye, An") == "eye for an eye"
    assert plain("Crouching Tiger, Hidden") == "crouching tiger hidden"
    assert names_of("Postino, Il (The Postman) (1994)")[1:3] == ["postino", "postman"]


def test_items_without_titles_are_found_by_id():
    catalogue = Catalogue([5, 7], [], [], np.zeros(0))
    assert catalogue.number("7") == 2 and not catalogue.titled and catalogue.search("7") == [2]
    with pytest.raises(UserError, match="use an id, such as 5, 7"):
        catalogue.number("8")


def test_search_as_you_type():
    catalogue = films()

    def found(query, k=10):
        return [catalogue.ids[number - 1] for number in catalogue.search(query, k)]

    assert found("st") == ["260", "1196", "1"]  # begins the title, then a word of it; most used first
    assert found("star wars v") == ["1196"] and found("the empire") == ["1196"] and found("1954") == ["915"]
    assert found("leon") == ["1207"] and found("zzz") == [] and found("", 2) == ["1", "6"]


# ---------------------------------------------------------------- scores and the best k


@pytest.mark.parametrize("persons", [1, 4, 5])
def test_scores_are_dot_products_however_large_the_table(monkeypatch, persons):
    rng = np.random.default_rng(persons)
    hidden, table = (rng.standard_normal((rows, 24), dtype=np.float32) for rows in (persons, 999))
    wanted = hidden.astype(np.float64) @ table.astype(np.float64).T
    for bytes_in_cache in (0, 2**25):
        monkeypatch.setattr("reclm.serve.top_k.IN_CACHE", bytes_in_cache)
        scores = score_items(hidden, table)
        assert scores.dtype == np.float32 and np.allclose(scores, wanted, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 3000, 41_005])
def test_top_k_is_a_stable_sort(size):
    rng = np.random.default_rng(size)
    for k in (1, 3, 10, size, size + 5):
        scores = rng.integers(0, 50, (5, size)).astype(np.float32) / 7  # with many ties
        scores[rng.random((5, size)) < 0.3] = -np.inf
        scores[3] = -np.inf
        for row, found in zip(scores, top_k(scores, k), strict=True):
            wanted = np.argsort(-row, kind="stable")[:k]
            assert found.tolist() == wanted[row[wanted] > -np.inf].tolist()


def test_top_k_of_a_large_row_looks_at_few_items(monkeypatch):
    scores = np.random.default_rng(0).random((1, 10**6), np.float32)
    sizes = []
    monkeypatch.setattr(np, "partition", lambda a, k, f=np.partition: (sizes.append(a.size), f(a, k))[1])
    assert top_k(scores, 10)[0].tolist() == np.argsort(-scores[0], kind="stable")[:10].tolist()
    assert max(sizes) < 20_000


def test_top_k_of_scores_that_are_arranged_against_it():
    """The best ones in the same stripe, in a row, in the rest that fills no stripe, and all equal"""
    size = 100**2 + 50
    for best in (slice(3, None, 100), slice(200, 230), slice(-20, None), slice(None)):
        scores = np.zeros(size, np.float32)
        scores[best] = np.arange(size, dtype=np.float32)[best] // 40 + 1
        for k in (1, 10, 25, 26):
            found = top_k(np.stack([scores, -scores]), k)
            assert found[0].tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
            assert found[1].tolist() == np.argsort(scores, kind="stable")[:k].tolist()
        assert top_k(np.full((1, size), 2.5), 10)[0].tolist() == list(range(10))


# ---------------------------------------------------------------- recommendations


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("row", ROWS)
def test_a_list_is_that_of_the_whole_model(block, row):
    recommender = make_recommender(**BLOCKS[block] | ROWS[row])
    people = [somebody(recommender, length, seed=length) for length in (1, 5, MAX_LEN, MAX_LEN + 9)]
    together = recommender.recommend_batch(people, 8)
    for person, items in zip(people, together, strict=True):
        scores = scores_of(recommender, person)
        scores[[0, *person.items]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:8]
        best = best[scores[best] > -np.inf]
        assert [item.id for item in items] == [str(99 + number) for number in best]
        assert [item.score for item in items] == pytest.approx(scores[best], abs=1e-4)
        assert recommender.recommend(person, 8) == [
            replace(item, score=pytest.approx(item.score, abs=1e-5)) for item in items
        ]


def random_filters(rng):
    def some(most):
        return tuple(rng.sample(range(1, NUM_ITEMS + 1), rng.randrange(most)))

    first = rng.randrange(1978, 2001)
    return Filters(
        genres=tuple(rng.sample(["Crime", "drama", "COMEDY", "War"], rng.choice([0, 0, 1, 2]))),
        years=rng.choice([None, (first, first + rng.randrange(12))]),
        exclude=some(8),
        candidates=rng.choice([None, some(25)]),
        min_count=rng.choice([0, 0, 3]),
        include_seen=rng.choice([None, True, False]),
    )


def test_10_000_random_filters_against_brute_force():
    """Exactly min(k, allowed) items, none of them left out or seen, and the best of those."""
    recommender, rng = make_recommender(), random.Random(0)
    people = [somebody(recommender, length, seed=length) for length in (1, 4, 20, 60)]
    scores = [scores_of(recommender, person) for person in people]
    hidden = recommender.engine.hidden(make_batch(people, recommender.reads))
    shown = recommender.catalogue
    for case in range(10_000):
        filters, k, who = random_filters(rng), rng.choice([1, 3, 10, 50]), case % len(people)
        ((numbers, _),) = recommender.best_of(hidden[who : who + 1], [people[who]], k, filters)
        seen = () if filters.include_seen else set(people[who].items.tolist())
        allowed = []
        for number in range(1, NUM_ITEMS + 1):
            genres = {name.lower() for name in shown.genres[number - 1].split("|")}
            year = int(shown.titles[number - 1][-5:-1])
            if (
                (not filters.genres or genres & {name.lower() for name in filters.genres})
                and (filters.years is None or filters.years[0] <= year <= filters.years[1])
                and number not in filters.exclude
                and (filters.candidates is None or number in filters.candidates)
                and shown.counts[number - 1] >= filters.min_count
                and number not in seen
            ):
                allowed.append(number)
        wanted = sorted(allowed, key=lambda number: -scores[who][number])[:k]
        assert numbers.tolist() == wanted, filters


def test_filters_that_cannot_be_meant_are_refused():
    recommender = make_recommender()
    for filters, named in (
        (Filters(genres=("Krimi",)), "known are Comedy, Crime, Drama, War"),
        (Filters(years=(1999, 1990)), "an empty range"),
    ):
        with pytest.raises(UserError, match=named):
            recommender.recommend(["100"], filters=filters)
    with pytest.raises(UserError, match="no years"):
        Catalogue([1], ["A film"], [], np.zeros(0)).left_out(Filters(years=(1990, 1999)))
    with pytest.raises(UserError, match="k=0"):
        recommender.recommend(["100"], 0)
    with pytest.raises(UserError, match="an empty history"):
        recommender.recommend([])
    with pytest.raises(UserError, match="a list of items"):
        recommender.recommend("100")


def test_a_model_that_ranks_seen_items_recommends_them():
    recommender = make_recommender()
    person = somebody(recommender, 30)
    recommender.about.config["filter_seen"] = False
    assert len(recommender.recommend(person, NUM_ITEMS)) == NUM_ITEMS
    kept = recommender.recommend(person, NUM_ITEMS, Filters(include_seen=False))
    assert len(kept) == NUM_ITEMS - len(set(person.items.tolist()))


def test_weights_that_are_not_finite_are_refused():
    recommender = make_recommender()
    recommender.engine.table[3] = np.nan
    with pytest.raises(UserError, match="non-finite"):
        recommender.recommend(["100"])


def test_popular_and_similar_items():
    recommender = make_recommender()
    assert [item.id for item in recommender.popular(3)] == ["106", "113", "120"]
    table = torch.from_numpy(recommender.engine.table)
    cosines = torch.cosine_similarity(table[5], table, dim=1)
    cosines[[0, 5]] = -2
    found = recommender.similar("104", 4)
    assert [int(item.id) - 99 for item in found] == cosines.argsort(descending=True)[:4].tolist()
    assert [item.score for item in found] == pytest.approx(cosines.sort(descending=True).values[:4].tolist())


def test_the_reasons_are_those_of_leaving_each_item_out():
    recommender = make_recommender(model_name="hstu")
    person = somebody(recommender, 12)
    items = recommender.recommend(person, 3)
    before = scores_of(recommender, person)
    for item, reasons in zip(items, recommender.why(person, [item.id for item in items]), strict=True):
        number = int(item.id) - 99
        drops = {}
        for removed in set(person.items.tolist()):
            rest = person.keep(person.items != removed)
            drops[removed] = before[number] - scores_of(recommender, rest)[number]
        wanted = sorted((n for n in drops if drops[n] > 0), key=lambda n: -drops[n])
        everything = recommender.why(person, [item.id], most=99)[0]
        assert [int(reason.id) - 99 for reason in everything] == wanted != drops.keys()
        wanted = wanted[:2]
        assert [int(reason.id) - 99 for reason in reasons] == wanted
        assert [reason.drop for reason in reasons] == pytest.approx([drops[n] for n in wanted], abs=1e-4)
    latest = {str(99 + number) for number in person.items[-2:]}
    assert {r.id for row in recommender.why(person, [items[0].id], last=2) for r in row} <= latest
    assert recommender.why(["100"], ["105"]) == [[]]  # nothing is left without the only one


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("row", [name for name in ROWS if name != "user"])
def test_a_session_equals_reading_the_whole_history(block, row):
    """Also past max_len, after an edit, and when an action comes at another time than expected."""
    recommender = make_recommender(**BLOCKS[block] | ROWS[row])
    reads = recommender.reads
    whole = somebody(recommender, MAX_LEN + 6)
    session = recommender.session(
        replace(whole.keep(slice(0, 3)), at=whole.times[3] if reads.times else None)
    )

    def add(place):
        after = np.append(whole.times, whole.at or 0)
        late = 500 * (place == 7)
        session.add(
            str(99 + whole.items[place]),
            rating=int(whole.codes["actions"][place]) or None if reads.codes else None,
            time=whole.times[place] + late if reads.times else None,
            next_time=after[place + 1] + late if reads.times else None,
        )
        scores = scores_of(recommender, session.person)
        torch.testing.assert_close(recommender.engine.table @ session.hidden, scores, rtol=1e-5, atol=1e-5)
        scores[[0, *session.person.items]] = -np.inf
        assert [int(item.id) - 99 for item in session.recommend(1)] == [scores.argmax()]

    for place in range(3, MAX_LEN + 5):
        add(place)
        if place == 12:
            session.set(session.person.keep(np.delete(np.arange(13), 4)))
    assert len(session.person) == MAX_LEN + 4


def test_a_session_reads_only_what_is_new(monkeypatch):
    recommender = make_recommender()
    session = recommender.session()
    with pytest.raises(UserError, match="an empty history: add"):
        session.recommend()
    starts = []
    start = recommender.engine.start
    monkeypatch.setattr(recommender.engine, "start", lambda batch: (starts.append(1), start(batch))[1])
    for item in range(100, 100 + MAX_LEN):
        session.add(str(item))
    assert len(starts) == 1  # the first item
    session.add("120")
    assert len(starts) == 2  # the row was full
    with pytest.raises(UserError, match="no item 'nothing'"):
        session.add("nothing")
    assert len(session.person) == MAX_LEN + 1 and session.recommend(1)


# ---------------------------------------------------------------- persons


def test_ratings_and_profiles_become_codes():
    recommender = make_recommender(action_embedding=True, profile_tokens=True)
    person = recommender.person(["100", "Film number 1"], [5, None], {"age": "24", "gender": "m"})
    assert person.items.tolist() == [1, 2] and person.codes["actions"].tolist() == [5, 0]
    assert person.profile.tolist() == [2, 2]
    assert recommender.person(["100"], [3.0]).codes["actions"].tolist() == [3]
    assert recommender.person(["100"], ["3"], {"age": "17"}).profile.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("row", "given", "named"),
    [
        ("feedback", {"ratings": [9]}, "ratings: '9' is not one of 1, 2, 3, 4, 5"),
        ("feedback", {"ratings": [float("nan")]}, "ratings: 'nan' is not one of"),
        ("plain", {"ratings": [5]}, "does not read ratings"),
        ("feedback", {"ratings": [1, 2]}, "1 items, but 2 ratings"),
        ("profile", {"profile": {"height": "2"}}, "profile field 'height': it reads gender, age"),
        ("profile", {"profile": {"gender": "x"}}, "gender: 'x' is not one of F, M"),
        ("profile", {"profile": {"age": "old"}}, "age: 'old' is not one of"),
        ("plain", {"at": 1.0}, "does not read times"),
        ("plain", {"times": [1.0]}, "does not read times"),
        ("time embedding", {"at": float("inf")}, "finite"),
        ("time embedding", {"times": [5.0], "at": 4.0}, "in order"),
        ("user", {}, "a vector per user"),
    ],
)
def test_what_a_model_does_not_read_is_refused(row, given, named):
    recommender = make_recommender(**ROWS[row])
    with pytest.raises(UserError, match=named):
        recommender.recommend(recommender.person(["100"], **given))


def test_an_action_before_the_last_one_is_refused():
    recommender = make_recommender(time_tokens="embedding")
    session = recommender.session(recommender.person(["100"], times=[1000.0]))
    with pytest.raises(UserError, match="earlier than the one before"):
        session.add("101", time=999.0)
    assert len(session.person) == 1
    session.add("101")  # at the time of the request
    assert session.person.times.tolist() == [1000.0, 1000.0]
