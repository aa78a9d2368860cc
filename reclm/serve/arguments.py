"""Requests over HTTP -> the arguments of a Recommender. Ids only: a title would find an item by chance."""

from collections.abc import Sequence

from fastapi import HTTPException

from reclm.errors import UserError
from reclm.serve import schemas
from reclm.serve.catalogue import Filters
from reclm.serve.person import Person
from reclm.serve.service import Model, Service


def not_found(text: str) -> HTTPException:
    return HTTPException(404, text)


def numbers_of(model: Model, ids: Sequence[str]) -> list[int]:
    """Item numbers. Raises 404 naming the first unknown id."""
    known = model.recommender.catalogue.by_id
    try:
        return [known[item] for item in ids]
    except KeyError as error:
        raise not_found(f"there is no item with the id {error.args[0]!r:.80}") from None


def filters_of(model: Model, allowed: schemas.Allowed) -> Filters:
    """Raises 404, or UserError for unknown genres and empty ranges."""
    filters = Filters(
        genres=tuple(allowed.genres),
        years=tuple(allowed.years) if allowed.years else None,
        exclude=tuple(numbers_of(model, allowed.exclude)),
        candidates=None if allowed.candidates is None else tuple(numbers_of(model, allowed.candidates)),
        min_count=allowed.min_count,
        include_seen=allowed.include_seen,
    )
    model.recommender.catalogue.left_out(filters)
    return filters


def person_of(service: Service, model: Model, asked: schemas.Someone) -> Person:
    """Raises 404, 413, or UserError for what the model does not know or read."""
    check_length(service, len(asked.items))
    ids = [entry if isinstance(entry, str) else entry.id for entry in asked.items]
    if not model.recommender.catalogue.by_id.keys() >= set(ids):
        numbers_of(model, ids)  # names the first unknown one
    ratings, times = ([getattr(entry, name, None) for entry in asked.items] for name in ("rating", "time"))
    if 0 < times.count(None) < len(times):
        raise UserError("times: give one for each item, or none")
    if None in times:
        times = []
    adapters = model.recommender.adapters
    if asked.adapter is not None and asked.adapter not in adapters:
        raise not_found(f"there is no adapter {asked.adapter!r:.80}, but {', '.join(adapters) or 'none'}")
    return model.recommender.person(ids, ratings, asked.profile, asked.at, times, asked.adapter)


def check_length(service: Service, length: int) -> None:
    if length > service.limits.max_history:
        raise HTTPException(413, f"{length:,} items, but a history may have {service.limits.max_history:,}")
