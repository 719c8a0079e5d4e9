"""Reports in a real browser: they are drawn, light and dark, and nothing complains."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_deft.report.style import DARK, LIGHT
from megatron_deft.report.write import write_report
from tests.distributed import run_ranks
from tests.report.made import results, write_results
from tests.training.ranks import config, train_all

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from report_screenshot import chromium, look, shrink

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="chromium is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def page(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs that were really trained, and of scores."""
    folder = tmp_path_factory.mktemp("report")
    val = {"data.val_files": f"[{base / 'val.jsonl'}]", "train.val_every": 5}
    configs = [config(base, folder / spec, objective=spec, **val) for spec in ("deft", "nll")]
    run_ranks(1, train_all, configs)
    content = results(["base", "deft", "nll"], ("a", "b"), 4)
    scores = write_results(folder / "results.json", content)
    runs = [folder / "deft", folder / "nll", scores]
    report = write_report(runs, folder / "report.html")
    assert report.left_out == {}
    return report.page


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_is_drawn(page: Path, tmp_path: Path, theme: object, width: int) -> None:
    picture = tmp_path / "page.png"
    assert look(page, picture, width, dark=theme is DARK) == []
    with Image.open(picture) as image:
        assert image.width == width
        assert image.height > 2500
        colours = {colour: n for n, colour in image.convert("RGB").getcolors(2**24)}
    mine, other = (LIGHT, DARK) if theme is LIGHT else (DARK, LIGHT)
    assert max(colours, key=lambda colour: colours[colour]) in (rgb(mine.page), rgb(mine.surface))
    assert colours.get(rgb(other.surface), 0) < 2000
    # the lines of both runs, the base, and maps
    for colour in (mine.runs[0], mine.runs[1], mine.grey):
        assert colours.get(rgb(colour), 0) > 100, colour
    assert len(colours) > 1000


def test_a_complaint_would_be_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<!DOCTYPE html><p>x</p><script>console.error('oh no')</script>")
    assert "oh no" in " ".join(look(wrong, tmp_path / "wrong.png"))


def test_a_picture_is_made_small(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    look(page, picture)
    shrink(picture, 300_000)
    assert 10_000 < picture.stat().st_size <= 300_000
