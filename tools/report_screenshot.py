#!/usr/bin/env python
"""A report as a picture, looked at in Debian's chromium (`apt-get install chromium`), headless.

The README's picture, after `OBJECTIVES="deft nll" examples/quickstart.sh`:

python tools/report_screenshot.py examples/results/report.png \
    deft=runs/quickstart/deft-run nll=runs/quickstart/nll-run runs/quickstart/results.json
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[1]
TALLEST = 9000  # pixels that a page may have


def chromium() -> str | None:
    """The browser's command; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def look(page: Path, picture: Path, width: int = 1280, dark: bool = False) -> list[str]:
    """Open a page and take a picture of all of it; what the browser complained about."""
    browser = chromium()
    assert browser is not None, "chromium is not installed"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-dev-shm-usage", f"--user-data-dir={profile}",
                "--enable-logging=stderr", "--proxy-server=127.0.0.1:9",  # no network
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={width},{TALLEST}", f"--screenshot={picture.resolve()}",
                page.resolve().as_uri(),
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _crop(picture)
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def _crop(picture: Path) -> None:
    """Cut off what is below the page: rows that are all like the last one."""
    image = Image.open(picture).convert("RGB")
    empty = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    box = ImageChops.difference(image, empty).getbbox()
    bottom = image.height if box is None else min(image.height, box[3] + 24)
    image.crop((0, 0, image.width, bottom)).save(picture, optimize=True)


def shrink(picture: Path, limit: int) -> None:
    """Store a picture in fewer colours, until the file has at most `limit` bytes."""
    image = Image.open(picture)
    for colours in (256, 128, 64, 32):
        if picture.stat().st_size <= limit:
            return
        image.quantize(colours, dither=Image.Dither.NONE).save(picture, optimize=True)
    assert picture.stat().st_size <= limit, f"{picture} has {picture.stat().st_size} bytes"


def main() -> int:
    """Write the report of the arguments into a temporary folder and take its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="PNG file to write")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as of `megatron-deft report`")
    parser.add_argument("--width", type=int, default=1180, help="pixels [1180]")
    parser.add_argument("--dark", action="store_true", help="as a dark system shows it")
    parser.add_argument("--limit", type=int, default=300_000, help="bytes [300000]")
    args = parser.parse_args()
    if chromium() is None:
        print("chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from megatron_deft.report.write import write_report

    with tempfile.TemporaryDirectory() as folder:
        report = write_report(args.runs, Path(folder) / "report.html")
        complaints = look(report.page, args.picture, args.width, args.dark)
    print("\n".join(complaints), end="")
    shrink(args.picture, args.limit)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
