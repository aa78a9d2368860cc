"""The part of scripts/bench/serve.py that edits histories on the page, in Chromium."""

import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import load
from passes import latency

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from serve import Bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from screenshot import find_chromium

HISTORY = 100  # items on the page
EDITS = 50  # per round
TAKEN = "performance.getEntriesByName('edit to list').map(entry => entry.duration)"


def page(bench: "Bench") -> dict:
    """ms from an edit of a history to the new list on the screen: of the served page, and of the page that is
    a file with the model in it, where such a file can be made"""
    from playwright.sync_api import sync_playwright

    rounds = {"served": [], "file": []}
    file = bench.export("films.html", bench.model, "--format=html")
    with load.serving(bench.model, 1, bench.work / "log") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for number in range(bench.args.rounds):
            for name, address in (("served", f"http://127.0.0.1:{server.port}/"), ("file", file.as_uri())):
                ids = random.Random(number).sample(bench.recommender.catalogue.ids, HISTORY)
                opened = browser.new_page()
                opened.goto(f"{address}#h={','.join(ids)}")
                opened.locator("#list > li").first.wait_for()
                rounds[name].append(latency(editing(opened)))
                opened.close()
    return {"rounds": rounds, "bytes of the file": file.stat().st_size}


def editing(opened: "Page") -> list[float]:
    """Move the latest item back and forth by its button; ms until the list, of each edit."""
    for number in range(EDITS):
        opened.locator('[data-key="down 0"]').click()
        while len(opened.evaluate(TAKEN)) == number:  # the page does not let wait_for_function do this
            time.sleep(0.001)
    return opened.evaluate(TAKEN)
