"""The folder of a run: which one, and may it be used?"""

import os
import time
from pathlib import Path

import yaml

from reclm.config import SECTIONS, Config
from reclm.errors import UserError
from reclm.run.checkpoint import load_checkpoint

ROOT = Path("runs")
LATEST = ROOT / "latest"


def chosen_dir(given: dict) -> Path:
    """--out_dir, or the folder of a checkpoint given by its path, or the run that runs/latest points at.
    Raises UserError where there is none."""
    ckpt = Path(given.get("ckpt_name", ""))
    if "out_dir" not in given and len(ckpt.parts) > 1 and ckpt.is_file():
        return ckpt.parent
    folder = Path(given.get("out_dir") or LATEST)
    if not folder.is_dir():
        raise UserError(f"no run in {folder}: train first (--eval_only=false) or name an --out_dir")
    return settle(folder)


def settle(folder: Path) -> Path:
    """runs/latest -> the run it points at now; another may start while this one works."""
    return ROOT / os.readlink(folder) if folder == LATEST else folder


def find_resume(given: dict) -> tuple[dict | None, Path | None]:
    """(state, path) of the checkpoint to go on from; (None, None) for a new run, (None, folder) for a
    run that was to go on but had not saved anything yet. Raises UserError."""
    resume = given.get("resume")
    if resume is None:
        return None, None
    if resume != "auto":
        if not Path(resume).is_file():
            raise UserError(f"--resume={resume}: no such file; use --resume=auto or the path of a .pth")
        return load_checkpoint(Path(resume)), Path(resume)
    folder = Path(given.get("out_dir") or LATEST)
    if not folder.is_dir():
        return None, None  # nothing to go on from: the same command starts and restarts a run
    folder = settle(folder)
    last = folder / "last.pth"
    return (load_checkpoint(last), last) if last.is_file() else (None, folder)


def claim_dir(cfg: Config, dataset: str, resumed: Path | None) -> Path:
    """Make the folder of this run, write the resolved settings, point runs/latest at it.

    A folder that holds another run is never used. Raises UserError."""
    if resumed is not None and cfg.run.out_dir is None:
        folder = resumed if resumed.is_dir() else resumed.parent
    elif cfg.run.out_dir is not None:
        folder = settle(Path(cfg.run.out_dir))
    else:
        folder = new_dir(f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset}-{cfg.model.model_name}")
    held = folder.is_dir() and any(folder.iterdir())
    if resumed is None or folder not in (resumed, resumed.parent):
        goes_on = False
    elif resumed.is_dir():  # killed before its first checkpoint: ours, if our settings lie there
        goes_on = (folder / "config.yaml").is_file()
    else:
        goes_on = True
        if resumed.name != "last.pth" and (folder / "last.pth").exists():
            raise UserError(f"{folder} has gone on after {resumed.name}: give this run its own --out_dir")
    if held and not goes_on:
        raise UserError(
            f"--out_dir={cfg.run.out_dir} is not empty and nothing there is overwritten: "
            "go on with --resume=auto or choose another --out_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(cfg))
    if folder.parent == ROOT:
        point_latest(folder)
    return folder


def new_dir(name: str) -> Path:
    """Create runs/<name>, with a number behind it where two runs start in the same second."""
    ROOT.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = ROOT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"too many runs called {name}")


def point_latest(folder: Path) -> None:
    work = ROOT / f".latest-{os.getpid()}"
    work.unlink(missing_ok=True)
    work.symlink_to(folder.name)
    os.replace(work, LATEST)  # never a moment without runs/latest


def dump_config(cfg: Config) -> str:
    """The resolved settings as YAML that --config reads again (without the folder of this run)."""
    parts = []
    for section, cls in SECTIONS.items():
        if section != "run":
            parts.append(f"# {cls.__doc__}\n" + yaml.safe_dump(vars(getattr(cfg, section)), sort_keys=False))
    return "\n".join(parts)
