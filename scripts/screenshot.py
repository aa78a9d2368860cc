"""Take the picture of the page for the README: serve a model, name three films, open the reasons of one.

    python scripts/screenshot.py                                            # docs/page.png, with the last run
    python scripts/screenshot.py --ckpt_name=runs/mine/best.pth --out=page.png --dark

Needs a model of MovieLens, Chromium, and pip install -r requirements-dev.txt.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reclm.errors import UserError, run_script
from reclm.run.output import ScriptParser

ROOT = Path(__file__).parent.parent
FILMS = ("Matrix (1999)", "Blade Runner (1982)", "Alien (1979)")  # the last one is the latest
SIZE = {"width": 1184, "height": 720}


def read_flags() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--ckpt_name", help="a checkpoint of the run or a path [best.pth]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.png", help="[docs/page.png]")
    parser.add_argument("--dark", action="store_true", help="with the dark colours")
    return parser.parse_args()


def find_chromium() -> str:
    """Raises UserError if it is missing."""
    found = [*filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))]
    if not found:
        raise UserError("there is no Chromium: apt-get install chromium")
    return found[0]


@contextmanager
def serving(checkpoint: str | None) -> Iterator[str]:
    """The address of a server with this checkpoint, on a free port. Raises UserError if it does not start."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port=0"]
    command += [f"--ckpt_name={checkpoint}"] if checkpoint else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            found = re.match(r"http://\S+", server.stdout.readline())
            if not found:
                raise UserError(server.stderr.read().removeprefix("error: ").strip() or "no server")
            yield found[0]
        finally:
            server.terminate()


def take(address: str, films: tuple[str, ...], out: Path, dark: bool = False) -> None:
    """Name these films at this address and write the picture. Raises UserError if it does not follow."""
    from playwright.sync_api import TimeoutError, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="dark" if dark else "light")
        page.set_default_timeout(20_000)
        try:
            page.goto(address)
            for number, film in enumerate(films, 1):
                page.fill("#query", film)
                page.locator("#option-0").click()
                page.locator(f"#films > li:nth-child({number})").wait_for()
            page.get_by_role("heading", name="For you").wait_for()
            page.locator("#list").get_by_role("button", name="Why").nth(1).click()
            page.locator(".why").wait_for()
        except TimeoutError:
            raise UserError(f"the page does not show {', '.join(films)}: use a model of MovieLens") from None
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
        browser.close()


def main() -> None:
    args = read_flags()
    find_chromium()
    with serving(args.ckpt_name) as address:
        take(address, FILMS, args.out, args.dark)
    print(f"written: {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    run_script(main)
