"""A trained model as a folder of the Hugging Face hub: written from a checkpoint, fetched, and read back.

    model.safetensors   the weights; the content of items is part of their vectors
    items.json          ids, numbers of actions and, where the licence allows, titles and genres
    config.json         settings, protocol, what the codes of ratings and profiles stand for, checksums
    README.md           the model card (scripts/model_card.py)

Nobody's actions are in it, and neither are ids or hashes of users. What is read may come from a stranger: it
is checked as a checkpoint is."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reclm.errors import UserError, first_line
from reclm.run import dist
from reclm.run.checkpoint import USERS, VERSION, checked, find_checkpoint, load_checkpoint
from reclm.run.folder import ROOT, chosen_dir
from reclm.run.output import write_whole
from reclm.serve.trained import Opened, build_model, open_state

WEIGHTS, ITEMS, SETTINGS, CARD = "model.safetensors", "items.json", "config.json", "README.md"
FORMAT = "toy-reclm"
MOST_CODES = 10**7
CONTENT = "content."  # prefix of the weights that turn item features into vectors
KEPT = ("config", "dataset", "protocol", "fingerprint", "ids", "num_rows", "values")
MOVIELENS = re.compile(r"movielens|(^|[\W_])ml[-_]?(\d|latest|small)", re.IGNORECASE)


# ---------------------------------------------------------------- write


def write_model(path: Path, folder: Path, titles: bool = False) -> dict:
    """Write the three files of the checkpoint at `path` into an existing folder, with titles and genres if
    asked for. Returns the checkpoint's state. Raises UserError if it may not or cannot be published."""
    state = load_checkpoint(path)
    refuse_private(state, path)
    if titles and is_movielens(state):
        raise UserError(
            "--with_titles: MovieLens may not be redistributed, and these items are MovieLens': leave the "
            "flag out; who has movies.dat can add the titles (docs/hub.md)"
        )
    if titles and not len(state["titles"]):
        raise UserError(f"--with_titles: {path} has no titles, as its data had none: leave the flag out")
    items = {"ids": listed(state["items"]), "counts": listed(state["item_counts"])}
    if titles:
        items |= {"titles": state["titles"], "genres": state["genre_names"]}
    save_weights(folder / WEIGHTS, publishable_weights(state, path))
    save_json(folder / ITEMS, items)
    files = {name: checksum(folder / name) for name in (WEIGHTS, ITEMS)}
    save_json(folder / SETTINGS, describe(state) | {"files": files})
    return state


def refuse_private(state: dict, path: Path) -> None:
    """Raises UserError for a model that holds something of single persons."""
    if USERS in state["model"]:
        raise UserError(
            f"{path} has a vector per user (--user_embedding=explicit): these are people's data, and of no "
            "use without them; train without that setting to publish a model"
        )
    for name in state["vocabulary"].get("meanings", {}):
        column = name.removeprefix("column ").removesuffix(" of the user table")
        texts = state["values"].get(column, [])
        if column != name and 2 * len(texts) > state["vocabulary"]["num_users"]:
            raise UserError(
                f"{path}: {column!r:.60} of the user table has {len(texts):,} values for "
                f"{state['vocabulary']['num_users']:,} users, so it would tell who they are: train without it"
            )


def is_movielens(state: dict) -> bool:
    """Are the items those of MovieLens, also as a file of the user's own? By the name of the data or, as in
    all of its releases, by item 1."""
    if any(MOVIELENS.search(str(name)) for name in (state["dataset"], state["config"].get("dataset"))):
        return True
    titles = dict(zip(map(str, listed(state["items"])), state["titles"], strict=False))
    return titles.get("1", "").startswith("Toy Story (1995)")


def publishable_weights(state: dict, path: Path) -> dict[str, torch.Tensor]:
    """The weights to evaluate, with the content of items added to their vectors: codes of genres and titles
    are the data's, and of no further use."""
    _, model = build_model(state, path)
    weights = dict(state["model"])
    if state["vocabulary"]["features"]:
        with torch.inference_mode():
            weights["item_embedding.weight"] = model.eval().item_table()
        weights = {name: weight for name, weight in weights.items() if not name.startswith(CONTENT)}
    return weights


def describe(state: dict) -> dict:
    """config.json of a state, without checksums; of paths on this machine, the file name alone is kept."""
    config = state["config"] | {"item_features": None, "id_dropout": 0.0, "data_dir": None}
    for name in ("dataset", "init_from"):
        config[name] = config.get(name) and Path(config[name]).name
    vocabulary = {name: value for name, value in state["vocabulary"].items() if name != "features"}
    epoch = state["progress"].get("epoch", 0)
    return {name: state[name] for name in (*KEPT, "last_time") if name in state} | {
        "format": FORMAT,
        "version": VERSION,
        "config": config,
        "fingerprint": state["fingerprint"].partition("-")[0],  # of the sequences
        "vocabulary": vocabulary | {"cold_items": listed(vocabulary["cold_items"])},
        "progress": {"epoch": epoch},
        "history": [row for row in state["history"] if row["epoch"] == epoch - 1],
    }


def listed(array: torch.Tensor | list) -> list:
    return array if isinstance(array, list) else array.tolist()


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    safetensors = import_safetensors()
    plain = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
    write_whole(path, lambda work: safetensors.save_file(plain, work, metadata={"format": "pt"}))


def save_json(path: Path, value: dict) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda work: work.write_text(text, encoding="utf-8"))


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("models of the hub need safetensors: pip install -r requirements-serve.txt") from None
    return safetensors.torch


# ---------------------------------------------------------------- read


def open_model(folder: Path, device: str = "cpu", quantize: str = "none") -> Opened:
    """What Recommender is made of, from such a folder. Raises UserError as `read_model` does."""
    return *open_state(read_model(folder), folder, device, quantize), None


def read_model(folder: Path) -> dict:
    """The state of a checkpoint, of which only training lacks something. Raises UserError for a folder that
    is incomplete, damaged, of another program or of an unsupported version."""
    missing = [name for name in (WEIGHTS, ITEMS, SETTINGS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no model of this program: {missing[0]} is missing")
    settings, items = read_json(folder / SETTINGS), read_json(folder / ITEMS)
    if settings.get("format") != FORMAT:
        raise UserError(f"{folder} is a model of another program: {SETTINGS} has no format {FORMAT}")
    version = settings.get("version")
    if not isinstance(version, int) or version > VERSION:  # before checksums, which it may keep elsewhere
        raise UserError(f"{folder} was written by another version of this program: use that version")
    try:
        for name in (WEIGHTS, ITEMS):
            if checksum(folder / name) != settings["files"][name]:
                raise UserError(
                    f"{folder / name} is damaged: its checksum is not that in {SETTINGS}: fetch it again"
                )
        state = restored(settings, items) | {"model": import_safetensors().load_file(folder / WEIGHTS)}
    except UserError:
        raise
    except Exception as error:  # damaged values raise nearly anything
        raise UserError(f"{folder} is damaged ({first_line(error)}): fetch it again") from None
    return checked(state, folder)


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is no JSON object; fetch it again")
    return found


def restored(settings: dict, items: dict) -> dict:
    """The state of a checkpoint but for its weights, from config.json and items.json."""
    ids, vocabulary = items["ids"], settings["vocabulary"]
    cold_items = torch.tensor(vocabulary["cold_items"], dtype=torch.int64)
    if len(cold_items) and not 0 < int(cold_items.min()) <= int(cold_items.max()) <= len(ids):
        raise ValueError("cold items that are none")
    vocabulary = vocabulary | {
        "num_users": int(vocabulary["num_users"]),
        "profile_sizes": tuple(map(size, vocabulary["profile_sizes"])),
        "code_sizes": {name: size(count) for name, count in vocabulary["code_sizes"].items()},
        "cold_items": cold_items,
        "features": {},
    }
    timed = {"last_time": settings["last_time"]} if "last_time" in settings else {}
    return timed | {
        **{name: settings[name] for name in (*KEPT, "version", "progress", "history")},
        "optimizer": {},
        "vocabulary": vocabulary,
        "items": torch.tensor(ids) if ids and isinstance(ids[0], int) else ids,
        "titles": items.get("titles", []),
        "genre_names": items.get("genres", []),
        "item_counts": torch.tensor(items["counts"], dtype=torch.int32),
    }


def size(count: int) -> int:
    """A number of codes. Raises ValueError for what would fail, or take all memory, in building the model."""
    if not 0 <= int(count) <= MOST_CODES:
        raise ValueError(f"{count} codes")
    return int(count)


# ---------------------------------------------------------------- the hub


def fetch(repo: str, revision: str | None = None) -> Path:
    """The folder with the model `repo` ("owner/name") of the hub in the hub's cache on this machine, fetched
    unless it is there. $HF_ENDPOINT replaces the server. Raises UserError if there is no such model or, the
    first time, no network."""
    from huggingface_hub import snapshot_download  # slow to import and only needed here

    endpoint = os.environ.get("HF_ENDPOINT")
    wanted = [WEIGHTS, ITEMS, SETTINGS]
    with hub_errors(repo):
        found = snapshot_download(repo, revision=revision, allow_patterns=wanted, endpoint=endpoint)
    return Path(found)


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload the files of a folder as the model `repo`, which is created if need be. Returns its address.
    Raises UserError without a token that may write there, without network, and if a private repository is
    asked for and the existing one is public."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            "no token of the hub: log in with `hf auth login`, or set HF_TOKEN to one that may write"
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub_errors(repo):
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # an existing one stays as it is
            raise UserError(
                f"{repo} exists and is public: make it private in its settings, or choose another"
            )
        names = [WEIGHTS, ITEMS, SETTINGS, CARD]
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message="Upload a model"
        )
    return str(address)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises inside the block into a UserError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except UserError:
        raise
    except HFValidationError:
        raise UserError(f"{repo!r:.120} is no name of a model on the hub: it is like owner/name") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise UserError(
            f"{repo}: {ANSWERS.get(code, f'the hub answers {code}: {first_line(error)}')}"
        ) from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"{repo}: {unreachable(error.__cause__ or error)}") from None
    except Exception as error:  # of the client's HTTP library, whose types change with its versions
        raise UserError(f"{repo}: {unreachable(error)}") from None


def unreachable(error: BaseException) -> str:
    return f"the hub cannot be reached ({first_line(error)}): is there a network, is HF_ENDPOINT right?"


ANSWERS = {  # of the hub, by HTTP status
    401: "the hub refuses the token, or there is no such model: check the name, log in with `hf auth login`",
    403: "this token may not write there: use a repository of your own, and a token that may write",
    404: "there is no such model on the hub, or it is private: check the name, log in with `hf auth login`",
}


def find_model(given: dict) -> tuple[Path, Path]:
    """(the folder of the run, its checkpoint) for --eval_only. With --from_hub=owner/name the checkpoint is
    the folder of a model, fetched, and the run is in --out_dir [default: runs/hub/owner/name]. Raises
    UserError if one of them does not exist."""
    repo = given.get("from_hub")
    if repo is None:
        return dist.on_main(lambda: find_run(given))
    path = dist.on_main(lambda: fetch(repo))
    out_dir = Path(given.get("out_dir") or ROOT / "hub" / repo)
    out_dir.mkdir(parents=True, exist_ok=True)
    return out_dir, path


def find_run(given: dict) -> tuple[Path, Path]:
    out_dir = chosen_dir(given)
    return out_dir, find_checkpoint(given.get("ckpt_name", "best.pth"), out_dir)


def load_state(path: Path) -> dict:
    """The state in a checkpoint file, or in such a folder. Raises UserError."""
    return read_model(path) if path.is_dir() else load_checkpoint(path)
