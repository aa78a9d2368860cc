"""The HTTP interface of a Recommender, a FastAPI application; scripts/serve.py runs it."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from reclm.errors import UserError
from reclm.serve import schemas
from reclm.serve.arguments import check_length, filters_of, not_found, numbers_of, person_of
from reclm.serve.middleware import Gate, Metrics, error_response
from reclm.serve.recommender import Item, Session
from reclm.serve.schemas import MOST_K, MOST_QUERY, MOST_WHY
from reclm.serve.service import Limits, Model, Service, Source

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: ; connect-src 'self'"
K = Annotated[int, Query(ge=1, le=MOST_K)]


def make_app(model: Model, limits: Limits, watched: Source | None = None) -> FastAPI:
    """The application that serves a model, and replaces it when `watched` changes."""
    service, metrics = Service(model, limits), Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch(watched)) if watched else None
        yield
        if watching:
            watching.cancel()

    app = FastAPIOffline("/docs", None, title="Toy-RecLM", redirect_slashes=False, lifespan=lifespan)
    app.state.service, app.state.metrics, app.state.page = service, metrics, PAGE.read_bytes()
    for method, path, endpoint, documented in ROUTES:
        app.add_api_route(path, endpoint, methods=[method], **documented)
    app.add_middleware(Gate, service=service, metrics=metrics)
    for kind, answer in ANSWERS.items():
        app.add_exception_handler(kind, answer)
    return app


# ---------------------------------------------------------------- errors


def failure(request: Request, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return error_response(status, text, request.scope["request_id"], headers)


# Coroutines: Starlette would send plain functions to a thread.
async def answer_http_error(request: Request, error: StarletteHTTPException) -> Response:
    return failure(request, error.status_code, str(error.detail), error.headers)


async def answer_user_error(request: Request, error: UserError) -> Response:
    return failure(request, 400, str(error))


async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
    """The one error whose place is named most exactly: an item may be a text or an object."""
    found = max(error.errors(), key=lambda entry: len(entry["loc"]))
    if found["type"] == "json_invalid":
        return failure(request, 400, f"the body is no JSON: {found['ctx']['error']}")
    place = [str(part) for part in found["loc"] if not NO_FIELD.match(str(part))]
    return failure(request, 422, f"{'.'.join(place) or 'body'}: {found['msg']}")


NO_FIELD = re.compile(r"(body|query|path|Action|str|int|float|constrained-.*)$")  # of pydantic's places
ANSWERS = {
    StarletteHTTPException: answer_http_error,
    RequestValidationError: answer_invalid,
    UserError: answer_user_error,
}


# ---------------------------------------------------------------- results -> JSON


def service_of(request: Request) -> Service:
    return request.app.state.service


encode = json.JSONEncoder(allow_nan=False).encode


def reply(content: Any, status: int = 200) -> Response:
    return Response(encode(content), status, media_type="application/json")


def ranked(items: list[Item]) -> list[dict]:
    return [
        {"place": place, "id": item.id, "title": item.title, "genres": item.genres, "score": item.score}
        for place, item in enumerate(items, 1)
    ]


async def recommendations(
    service: Service, model: Model, call: Callable[[], list[Item]], asked: schemas.Asked | schemas.NextAction
) -> dict:
    """The answer to POST /recommend, without its basis, from a call that gives the items"""
    begin = perf_counter()
    items = await service.line.call(call, model.in_thread)
    milliseconds = round(1000 * (perf_counter() - begin), 3)
    return {"items": ranked(items), "complete": len(items) == asked.k, "milliseconds": milliseconds}


# ---------------------------------------------------------------- page and operation


async def page(request: Request) -> Response:
    headers = {"Content-Security-Policy": POLICY}
    return Response(request.app.state.page, headers=headers, media_type="text/html; charset=utf-8")


async def icon() -> Response:
    return Response(status_code=204)


async def health(request: Request) -> Response:
    stopping = service_of(request).stopping
    return failure(request, 503, "the server is stopping") if stopping else reply({"status": "ok"})


async def metrics(request: Request) -> Response:
    text = request.app.state.metrics.text(service_of(request))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


# ---------------------------------------------------------------- the model and its items


async def about(request: Request) -> Response:
    service = service_of(request)
    model = service.model
    content = model.recommender.describe() | {
        "checkpoint": model.name,
        "users": len(model.histories) if model.histories else 0,
        "limits": {"k": MOST_K, "history": service.limits.max_history, "why": MOST_WHY},
    }
    return reply(content)


async def items(
    request: Request,
    q: Annotated[str, Query(max_length=MOST_QUERY)] = "",
    k: K = 10,
    ids: Annotated[str | None, Query(description="these items, in this order: 1,2,3")] = None,
) -> Response:
    """Search as you type; an empty q gives the most used items."""
    service = service_of(request)
    model = service.model
    catalogue = model.recommender.catalogue
    if ids is None:
        numbers = await service.line.call(lambda: catalogue.search(q, k))
    else:
        chosen = ids.split(",") if ids else []
        check_length(service, len(chosen))
        numbers = numbers_of(model, chosen)
    return reply({"items": [described(model, n) | {"count": int(catalogue.counts[n - 1])} for n in numbers]})


def described(model: Model, number: int) -> dict:
    item = model.recommender.item(number)
    return {"id": item.id, "title": item.title, "genres": item.genres}


async def similar(item: str, request: Request, k: K = 10) -> Response:
    service = service_of(request)
    model = service.model
    numbers_of(model, [item])
    found = await service.line.call(lambda: model.recommender.similar(item, k))
    return reply({"items": ranked(found)})


# ---------------------------------------------------------------- recommendations


async def recommend(asked: schemas.Asked, request: Request) -> Response:
    """The k best items for a person; the most used ones where the history is empty."""
    service = service_of(request)
    model = service.model
    person, filters = person_of(service, model, asked), filters_of(model, asked.filters)
    recommender = model.recommender
    if len(person):
        basis, call = "model", lambda: recommender.recommend(person, asked.k, filters)
    else:
        basis, call = "popular", lambda: recommender.popular(asked.k, filters)
    return reply({"basis": basis} | await recommendations(service, model, call, asked))


async def why(asked: schemas.AskedWhy, request: Request) -> Response:
    """For each item of `of` the actions, of the last 50, without which its score would fall most."""
    service = service_of(request)
    model = service.model
    person = person_of(service, model, asked)
    numbers_of(model, asked.of)
    call = lambda: model.recommender.why(person, asked.of, 3, MOST_WHY)  # noqa: E731
    found = await service.line.call(call)
    return reply({"reasons": [[vars(reason) for reason in reasons] for reasons in found]})


# ---------------------------------------------------------------- sessions


def sessions_of(service: Service) -> dict[str, Session]:
    """Raises 409 where there are none."""
    if service.model.recommender.is_ctr:
        raise HTTPException(409, "a session needs a model of --task=matching")
    if not service.limits.max_sessions:
        raise HTTPException(409, "this server has no sessions: start it with --workers=1 and --max_sessions")
    return service.model.sessions


def find_session(service: Service, key: str) -> Session:
    """Raises 404 and 409."""
    sessions = sessions_of(service)
    if key not in sessions:
        raise not_found("there is no such session: it has ended, or another model came into service")
    sessions.move_to_end(key)
    return sessions[key]


async def begin_session(asked: schemas.Someone, request: Request) -> Response:
    service = service_of(request)
    model = service.model
    sessions_of(service)
    person = person_of(service, model, asked)
    session = await service.line.call(lambda: model.recommender.session(person), model.in_thread)
    key = model.open_session(session, service.limits.max_sessions)
    return reply({"id": key, "length": len(person)}, 201)


async def session_state(key: str, request: Request) -> Response:
    return reply({"id": key, "length": len(find_session(service_of(request), key).person)})


async def end_session(key: str, request: Request) -> Response:
    service = service_of(request)
    find_session(service, key)
    with suppress(KeyError):
        del service.model.sessions[key]
    return Response(status_code=204)


async def add_action(key: str, action: schemas.NextAction, request: Request) -> Response:
    """Add an action to a session and recommend."""
    service = service_of(request)
    model = service.model
    session, filters = find_session(service, key), filters_of(model, action.filters)
    numbers_of(model, [action.id])

    def call() -> list[Item]:
        check_length(service, len(session.person) + 1)
        session.add(action.id, action.rating, action.time, action.next_time)
        return session.recommend(action.k, filters)

    content = await recommendations(service, model, call, action)
    return reply(content | {"basis": "model", "length": len(session.person)})


# ---------------------------------------------------------------- users of the training data


async def users(request: Request, k: K = 5) -> Response:
    """The ids of k random users"""
    known = histories_of(service_of(request).model).users
    return reply({"users": [str(known[i]) for i in random.sample(range(len(known)), min(k, len(known)))]})


def histories_of(model: Model) -> Any:
    if model.histories is None:
        raise not_found("this server offers no users")
    return model.histories


async def user(user: str, request: Request, k: K = 10) -> Response:
    """A user's last actions and profile, and recommendations"""
    service = service_of(request)
    model = service.model
    histories_of(model)
    try:
        person = model.recommender.user(user)
    except UserError as error:
        raise not_found(str(error)) from None
    found = await service.line.call(lambda: model.recommender.recommend(person, k), model.in_thread)
    recent = person.keep(slice(-service.limits.max_history, None))  # what POST /recommend takes
    texts = model.recommender.reads.codes.get("actions", [])
    ratings = recent.codes.get("actions", np.zeros(len(recent), np.int64)).tolist()
    history = [
        described(model, number) | ({"rating": texts[rating - 1]} if rating else {})
        for number, rating in zip(recent.items.tolist(), ratings, strict=True)
    ]
    fields = zip(model.recommender.reads.profile.items(), person.profile.tolist(), strict=False)
    profile = {name: values[code - 1] for (name, values), code in fields if code}
    content = {"id": user, "history": history, "length": len(person), "profile": profile}
    return reply(content | {"items": ranked(found)})


# ---------------------------------------------------------------- the interface


def described_by(schema: type[BaseModel] | None, *errors: int, status: int = 200) -> dict[str, Any]:
    """The arguments of a route that document its answers"""
    wrong = {code: {"model": schemas.Error} for code in (*errors, 408, 413, 422, 429, 500, 503)}
    return {"status_code": status, "response_model": schema, "responses": wrong}


HIDDEN = {"include_in_schema": False}
ROUTES = [  # searched in this order
    ("POST", "/recommend", recommend, described_by(schemas.Recommendations, 400, 404)),
    ("POST", "/sessions/{key}/actions", add_action, described_by(schemas.Grown, 400, 404, 409)),
    ("GET", "/items", items, described_by(schemas.Found, 404)),
    ("POST", "/why", why, described_by(schemas.Reasons, 400, 404)),
    ("POST", "/sessions", begin_session, described_by(schemas.SessionState, 400, 404, 409, status=201)),
    ("GET", "/sessions/{key}", session_state, described_by(schemas.SessionState, 404, 409)),
    ("DELETE", "/sessions/{key}", end_session, described_by(None, 404, 409, status=204)),
    ("GET", "/similar/{item:path}", similar, described_by(schemas.RankedItems, 404)),
    ("GET", "/users", users, described_by(schemas.Users, 404)),
    ("GET", "/users/{user:path}", user, described_by(schemas.User, 404)),
    ("GET", "/model", about, described_by(schemas.About)),
    ("GET", "/health", health, HIDDEN),
    ("GET", "/metrics", metrics, HIDDEN),
    ("GET", "/", page, HIDDEN),
    ("GET", "/favicon.ico", icon, HIDDEN),
]
