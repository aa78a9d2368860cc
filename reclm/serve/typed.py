"""What a person types on the command line: histories, profiles, times, filters."""

from datetime import UTC, datetime
from pathlib import Path

from reclm.errors import UserError
from reclm.serve.catalogue import Catalogue, Filters
from reclm.serve.person import Person
from reclm.serve.recommender import Recommender

LONGEST = 4096  # characters of a file name


def read_list(flag: str, text: str) -> list[str]:
    """The entries of a text separated by semicolons, or of the file of this name, one per line; without empty
    ones. Raises UserError for a file that is no text, and if there is no entry."""
    path = Path(text)
    if len(text) < LONGEST and "\0" not in text and path.is_file():
        try:
            entries = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--{flag}={path} cannot be read as text in UTF-8 ({error})") from None
    else:
        entries = text.split(";")
    entries = [entry.strip() for entry in entries if entry.strip()]
    if not entries:
        raise UserError(f"--{flag}={text:.80} is empty: name at least one item, or a text file with items")
    return entries


def split_entry(entry: str, catalogue: Catalogue) -> tuple[str, str | None, float | None]:
    """ "Heat (1995)=5@2001-05-01" -> (item, rating or None, seconds since 1970 or None). Raises UserError."""
    if entry in catalogue.by_id or entry in catalogue.titles:
        return entry, None, None
    rest, at, time = entry.rpartition("@")
    item, equals, rating = (rest if at else entry).rpartition("=")
    item = item if equals else rating
    return item.strip(), rating.strip() if equals else None, read_time(time.strip()) if at else None


def read_profile(text: str | None) -> dict[str, str]:
    """ "gender=F,age=25" -> {"gender": "F", "age": "25"}. Raises UserError for another form."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise UserError(f"--profile={text:.80} must look like gender=F,age=25")
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_time(text: str | None) -> float | None:
    """ "2001-05-01T20:00", in UTC unless it names a time zone -> seconds since 1970. Raises UserError."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"the time {text!r:.60} must look like 2001-05-01T20:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def read_person(
    recommender: Recommender,
    user: str | None,
    history: str | None,
    profile: str | None,
    at: str | None,
    of_two: bool = False,
) -> Person:
    """The user of the training data with this id, or else a person with this typed history and profile.
    Raises UserError for what cannot be read, and for what the model does not know or does not read; the
    latter is ignored for the first model `of_two`."""
    reads = recommender.reads
    if of_two:
        profile, at = profile if reads.profile else None, at if reads.times else None
    moment = read_time(at)
    if user is not None:
        if profile:
            raise UserError("--profile is for --history: that of a --user is known")
        if moment is not None and not reads.times:
            raise UserError("this model does not read times: leave --at out")
        person = recommender.user(user, moment)
        if moment is not None and len(person.times) and moment < person.times[-1]:
            last = datetime.fromtimestamp(person.times[-1], UTC)
            raise UserError(f"--at={at} is before the last action of user {user} ({last:%Y-%m-%dT%H:%M})")
        return person
    entries = [split_entry(entry, recommender.catalogue) for entry in read_list("history", history or "")]
    items, ratings, times = zip(*entries, strict=True)
    if of_two:
        ratings, times = ratings if "actions" in reads.codes else (), times if reads.times else (None,)
    if any(time is not None for time in times) and None in times:
        raise UserError("--history has times for some items only: give one for each, or none")
    return recommender.person(items, ratings, read_profile(profile), moment, [] if None in times else times)


def read_filters(
    catalogue: Catalogue,
    genres: str | None = None,
    years: str | None = None,
    exclude: str | None = None,
    candidates: Path | None = None,
    **others: int | bool | None,
) -> Filters:
    """Filters as typed: genres "Comedy,Crime", years "1990:1999" or "1994", items to exclude, and the file of
    the only items to choose from; `others` are fields of Filters. Raises UserError."""

    def numbers(flag: str, text: str) -> tuple[int, ...]:
        return tuple(map(catalogue.number, read_list(flag, text)))

    if candidates is not None and not candidates.is_file():
        raise UserError(f"--candidates={candidates} does not exist: name a text file with one item per line")
    first, _, last = (years or "").partition(":")
    try:
        span = (int(first), int(last or first)) if years else None
    except ValueError:
        raise UserError(f"--years={years:.40} must look like 1990:1999") from None
    return Filters(
        genres=tuple(part.strip() for part in (genres or "").split(",") if part.strip()),
        years=span,
        exclude=numbers("exclude", exclude) if exclude else (),
        candidates=None if candidates is None else numbers("candidates", str(candidates)),
        **others,
    )
