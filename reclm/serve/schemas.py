"""What scripts/serve.py reads and answers, as types: requests are checked with them, and they are the OpenAPI
description. All ids are text."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_K, MOST_LISTED, MOST_WHY, MOST_QUERY, MOST_OF = 100, 10_000, 50, 200, 10  # of one request

Id = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=200)]
K = Annotated[int, Field(ge=1, le=MOST_K)]
# Beyond the year 5138 it is milliseconds by mistake.
Seconds = Annotated[float, Field(ge=-1e11, le=1e11, description="since 1970")]
Rating = int | float | Text
Listed = Annotated[list[Id], Field(max_length=MOST_LISTED)]


class Request(BaseModel):
    # Strict: 260 is no id, "10" no number. A misspelt field is an error that names it.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Action(Request):
    id: Id
    rating: Rating | None = None
    time: Seconds | None = None


class Allowed(Request):
    """Filters of reclm/serve/catalogue.py"""

    genres: Annotated[list[Text], Field(max_length=100)] = []
    years: Annotated[list[Annotated[int, Field(ge=0, le=9999)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    exclude: Listed = []
    candidates: Listed | None = None
    min_count: Annotated[int, Field(ge=0, le=2**31)] = 0
    include_seen: bool | None = None


class Someone(Request):
    """A person: actions, oldest first, each an id or an object"""

    items: list[Id | Action] = []
    profile: Annotated[dict[Text, Text], Field(max_length=100)] = {}
    at: Seconds | None = None
    adapter: Annotated[Text | None, Field(description="one of the adapters of GET /model")] = None


class Asked(Someone):
    k: K = 10
    filters: Allowed = Field(default_factory=Allowed)


class AskedWhy(Asked):
    of: Annotated[list[Id], Field(max_length=MOST_OF)]


class NextAction(Action):
    next_time: Seconds | None = None
    k: K = 10
    filters: Allowed = Field(default_factory=Allowed)


# ---------------------------------------------------------------- answers


class Error(BaseModel):
    error: str
    request_id: str


class Reads(BaseModel):
    ratings: list[str]
    profile: dict[str, list[str]]
    times: bool
    request_time: bool
    max_len: int


class About(BaseModel):
    dataset: str
    protocol: str
    trained: str
    checkpoint: str
    items: int
    users: int
    titled: bool
    reads: Reads
    genres: list[str]
    years: list[int] | None
    limits: dict[str, int]
    task: str
    adapters: list[str]


class Shown(BaseModel):
    id: str
    title: str
    genres: str


class Counted(Shown):
    count: int


class Found(BaseModel):
    items: list[Counted]


class Ranked(Shown):
    place: int
    score: float


class RankedItems(BaseModel):
    items: list[Ranked]


class Recommendations(RankedItems):
    basis: Literal["model", "popular"]
    complete: bool
    milliseconds: float


class Grown(Recommendations):
    length: int


class Reason(BaseModel):
    id: str
    title: str
    drop: float


class Reasons(BaseModel):
    reasons: list[list[Reason]]


class SessionState(BaseModel):
    id: str
    length: int


class Users(BaseModel):
    users: list[str]


class Past(Shown):
    rating: str | None = None


class User(RankedItems):
    id: str
    history: list[Past]
    length: int
    profile: dict[str, str]
