"""How long does a report take to open in a browser?

Pages of made-up studies of 30 blocks, opened by Chromium without a window: "ready" is when the code of the page has
run, and tables and buttons are there; "laid out" is when the place of the first table is known; both from the start of
the navigation. Medians of 5 fresh browsers. "written" is what making the page takes.

    python benchmarks/page.py
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _common

sys.path.insert(0, str(Path(__file__).parents[1]))
from secateur.pages import page
from secateur.verbs.report import report
from tests.pages.made import study, write

TRIALS, BROWSERS = (100, 500), 5
CLOCK = """
const told = document.body.dataset;
told.ready = performance.now();
document.querySelector("table").getBoundingClientRect();
told.laid = performance.now();
"""


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("there is no Chromium on this machine")
    read = page.Path.read_text
    page.Path.read_text = lambda path, **given: read(path, **given) + (CLOCK if path.name == "page.js" else "")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for trials in TRIALS:
            out = Path(scratch) / f"{trials}.html"
            made = write(Path(scratch) / f"{trials}.json", study(trials, blocks=30))
            started = time.monotonic()
            report([made], out)
            row = {"trials": trials, "MB": out.stat().st_size / 1e6, "written, s": time.monotonic() - started}
            command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
            seen = [
                subprocess.run(
                    [*command, f"--user-data-dir={scratch}/profile-{trials}-{number}", out.as_uri()],
                    capture_output=True, text=True, timeout=300, check=True,
                ).stdout for number in range(BROWSERS)
            ]  # fmt: skip
            for name, title in (("ready", "ready, s"), ("laid", "laid out, s")):
                row[title] = statistics.median(float(re.search(f'data-{name}="([^"]+)"', dom)[1]) / 1e3 for dom in seen)
            rows.append(row)
    _common.store("page", " ".join(" ".join(__doc__.split("\n\n")[1:-1]).split()), rows)


if __name__ == "__main__":
    main()
