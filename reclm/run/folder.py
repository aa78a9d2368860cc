"""The folder of a run: find an existing one, or claim a new one without overwriting anything."""

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
    """The existing run folder for --eval_only: --out_dir, else the folder of the checkpoint whose path is
    --ckpt_name, else the run that runs/latest points to. Raises UserError if it does not exist."""
    ckpt = Path(given.get("ckpt_name", ""))
    if "out_dir" not in given and len(ckpt.parts) > 1 and ckpt.is_file():
        return ckpt.parent
    folder = Path(given.get("out_dir") or LATEST)
    if not folder.is_dir():
        raise UserError(f"no run in {folder}: train first (--eval_only=false) or give the --out_dir of a run")
    return settle(folder)


def settle(folder: Path) -> Path:
    """The run that runs/latest points to now, since another run may start meanwhile; else the folder."""
    return ROOT / os.readlink(folder) if folder == LATEST else folder


def find_resume(given: dict) -> tuple[dict | None, Path | None]:
    """(state, path) of the checkpoint to resume from; (None, None) for a new run; (None, folder) for a run
    that was stopped before its first checkpoint. Raises UserError if the file is missing or damaged."""
    resume = given.get("resume")
    if resume is None:
        return None, None
    if resume != "auto":
        if not Path(resume).is_file():
            raise UserError(f"--resume={resume}: no such file; use --resume=auto or the path of a .pth file")
        return load_checkpoint(Path(resume)), Path(resume)
    folder = Path(given.get("out_dir") or LATEST)
    if not folder.is_dir():
        return None, None  # nothing to resume: the same command can start and restart a run
    folder = settle(folder)
    last = folder / "last.pth"
    return (load_checkpoint(last), last) if last.is_file() else (None, folder)


def claim_dir(cfg: Config, dataset: str, resumed: Path | None) -> Path:
    """Make the folder of this run, write its settings to config.yaml and point runs/latest to it. `resumed`
    is the path from find_resume. Raises UserError if the folder holds anything but the run to resume."""
    if resumed is not None and cfg.run.out_dir is None:
        folder = resumed if resumed.is_dir() else resumed.parent
    elif cfg.run.out_dir is not None:
        folder = settle(Path(cfg.run.out_dir))
    else:
        folder = new_dir(f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset}-{cfg.model.model_name}")
    held = folder.is_dir() and any(folder.iterdir())
    if resumed is None or folder not in (resumed, resumed.parent):
        goes_on = False
    elif resumed.is_dir():  # killed before its first checkpoint; a run folder has a config.yaml
        goes_on = (folder / "config.yaml").is_file()
    else:
        goes_on = True
        if resumed.name != "last.pth" and (folder / "last.pth").exists():
            raise UserError(f"--resume={resumed} would overwrite later epochs: choose another --out_dir")
    if held and not goes_on:
        raise UserError(
            f"--out_dir={cfg.run.out_dir} is not empty: "
            "continue its run with --resume=auto or choose another --out_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(cfg))
    if folder.parent == ROOT:
        point_latest(folder)
    return folder


def new_dir(name: str) -> Path:
    """Create runs/<name>, or runs/<name>-2, -3, ... if another run started in the same second."""
    ROOT.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = ROOT / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"there are 999 runs called runs/{name}: give an --out_dir")


def point_latest(folder: Path) -> None:
    """Make the symbolic link runs/latest point to the folder."""
    work = ROOT / f".latest-{os.getpid()}"
    work.unlink(missing_ok=True)
    work.symlink_to(folder.name)
    os.replace(work, LATEST)  # atomic: runs/latest exists at every moment


def dump_config(cfg: Config) -> str:
    """All settings but those of section `run`, as YAML that --config can read."""
    parts = []
    for section, cls in SECTIONS.items():
        if section != "run":
            parts.append(f"# {cls.__doc__}\n" + yaml.safe_dump(vars(getattr(cfg, section)), sort_keys=False))
    return "\n".join(parts)
