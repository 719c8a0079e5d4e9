"""Whole reports: the page parsed, every file there, nothing replaced that is not ours."""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_deft.errors import UserError
from megatron_deft.report.arguments import add_report_arguments, run_report
from megatron_deft.report.style import LIGHT
from megatron_deft.report.write import Report, write_report
from tests.report.made import record, results, without_new, write_results, write_run

VOID = {"meta", "br", "link", "input", "img"}
FIGURES = ["training", "confidence", "probabilities", "landscape"]
QUICKSTART = Path(__file__).parents[2] / "examples" / "results" / "quickstart.json"


class Page(HTMLParser):
    """A page taken apart; complains about what is not closed, and ids that occur twice."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        ids = [found["id"] for _, found in self.tags if "id" in found]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.titles.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def figures(self) -> list[str | None]:
        return [found["id"] for tag, found in self.tags if tag == "figure"]


class Texts(HTMLParser):
    """The texts of a figure as they are read."""

    def __init__(self, svg: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(svg)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs, one of which blew up for a step and was stopped."""
    folder = tmp_path_factory.mktemp("two")
    lines = [record(step, factor=2.0) for step in range(1, 31)]
    lines[4] |= {"loss": None, "grad_norm": None, "nonfinite": ["loss", "grad_norm"]}
    return [
        write_run(folder / "deft"),
        write_run(folder / "nll", lines, objective="nll", optim={"lr": 3e-5}),
    ]


@pytest.fixture(scope="module")
def whole(two: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report of both runs, and of scores of three models on two sets."""
    folder = tmp_path_factory.mktemp("whole")
    content = results(["base", "deft", "nll"], ("aime24", "amc23"), 4)
    scores = write_results(folder / "results.json", content)
    return write_report([*two, scores], folder / "out" / "page.html")


def test_a_report_of_runs_and_scores(whole: Report) -> None:
    page = Page(whole.page)
    assert whole.left_out == {}
    assert page.figures() == ["scores", "pass_at_k", *FIGURES]
    assert page.titles == [
        "Training report: deft, nll", "Runs", "What differs in their configurations",
        "Competition maths: base and objectives", "Training", "Trust gate and confidence",
        "Probabilities over training", "Token gradient landscape",
    ]  # fmt: skip
    folder = whole.page.with_name("page_figures")
    for name in page.figures():
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width == 1650
            assert len(picture.convert("RGB").getcolors(2**24)) > 50  # not blank
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")
    assert sorted(json.loads((folder / "figures.json").read_text())) == sorted(page.figures())
    assert sorted(whole.figures) == sorted(folder.glob("*.[ps]*g"))
    assert [tag for tag, _ in page.tags].count("svg") == 6


def test_nothing_is_fetched(whole: Report) -> None:
    text = whole.page.read_text()
    assert "://" not in text
    assert not re.search(r"<(script|link|iframe|img|object)\b|@import|@font-face", text)
    for target in re.findall(r'(?:href|src)="([^"]+)"|url\(([^)]+)\)', text):
        assert "".join(target).startswith(("#", "data:image/png;base64,"))


def test_figures_have_the_colours_of_the_page(whole: Report) -> None:
    style, _, body = whole.page.read_text().partition("</style>")
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []
    assert set(re.findall(r"var\((--[\w-]+)\)", body)) <= set(re.findall(r"(--[\w-]+):", style))


def test_what_a_run_is(whole: Report) -> None:
    page = Page(whole.page)
    runs, differ, *_ = page.tables
    assert runs[0] == [
        "run", "objective", "model", "data", "steps", "tokens", "last loss", "last cross-entropy",
        "validation cross-entropy",
    ]  # fmt: skip
    assert runs[1] == [
        "deft", "deft", "weights/tiny", "data/a, data/b", "40", "5.12k", "0.3679", "1.104", "1.5",
    ]  # fmt: skip
    assert runs[2][4] == "30 of 40"
    assert differ == [
        ["key", "deft", "nll"],
        ["objective", "deft", "nll"],
        ["optim.lr", "1e-05", "3e-05"],
        ["optim.warmup_steps", "null", "-"],
    ]
    assert "nll: It has done 30 of 40 steps: it was stopped, or still runs." in page.text
    assert "leave gaps: grad_norm (1), loss (1)." in page.text


def test_the_committed_scores_of_the_quickstart(tmp_path: Path) -> None:
    report = write_report([QUICKSTART], tmp_path / "page.html")
    page = Page(report.page)
    assert page.figures() == ["scores"]
    head, base, deft, nll = page.tables[0]
    assert head == ["model", "exact match", "normalised", "Jaro-Winkler"]
    assert base[:2] == ["base", "24.5 [20.5, 28.9]"]
    assert deft[1] == "67.2 [62.5, 71.7]+42.8 [+37.5, +47.5]"
    assert nll[0] == "nll"


def test_scores_by_set_and_a_model_without_one(tmp_path: Path) -> None:
    content = results(["base", "deft"], ("a", "b"))
    del content["models"]["deft"]["sets"]["b"]
    content["models"]["deft"]["scores"]["exact"]["delta"] |= {"low": 0.05}
    path = write_results(tmp_path / "results.json", content)
    overall, by_set = Page(write_report([path], tmp_path / "page.html").page).tables
    assert overall[2][1] == "30.0 [25.0, 35.0]+10.0 [+5.0, +25.0]"
    assert by_set[0] == ["model", "mean of the sets", "a", "b"]
    assert by_set[1] == [
        "base", "20.0 [15.0, 25.0]", "20.0 [15.0, 25.0]", "25.0 [20.0, 30.0]",
    ]  # fmt: skip
    assert by_set[2][3] == "-"
    # bold where 0 is outside of the interval, and nowhere else
    text = (tmp_path / "page.html").read_text()
    assert text.count('<span class="sure">+10.0</span>') == 2
    assert text.count("<small>+10.0 ") == 1


def test_a_single_set_is_not_repeated(tmp_path: Path) -> None:
    path = write_results(tmp_path / "results.json", results(["base", "deft"], ("a",), 4))
    report = write_report([path], tmp_path / "page.html")
    page = Page(report.page)
    assert len(page.tables) == 1
    assert "by set" not in page.text
    assert "mean of the sets" not in (report.folder / "pass_at_k.svg").read_text()


def test_names_are_shown_as_they_are(two: list[Path], tmp_path: Path) -> None:
    """None is read as mathematics, and none warns of letters that the pictures' font lacks."""
    runs, models = ["cost_$5", "$x^$"], ["_hidden", "\N{CJK UNIFIED IDEOGRAPH-4E2D}"]
    sets = (r"$\alpha$", "b")
    path = write_results(tmp_path / "results.json", results(models, sets, 4))
    named = [f"{name}={folder}" for name, folder in zip(runs, two, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = write_report([*named, path], tmp_path / "page.html")
    shown = {"scores": models, "pass_at_k": [*models, *sets], **dict.fromkeys(FIGURES, runs)}
    for figure, names in shown.items():
        texts = Texts((report.folder / f"{figure}.svg").read_text()).texts
        for name in names:
            assert any(name in text for text in texts), (figure, name)


def test_long_names_are_shortened_in_figures(two: list[Path], tmp_path: Path) -> None:
    names = [f"{i}{'_and_so_on' * 17}" for i in range(2)]
    content = results(names, (names[0], "b"), 4)
    path = write_results(tmp_path / "results.json", content)
    named = [f"{name}={folder}" for name, folder in zip(names, two, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layout collapsed
        report = write_report([*named, path], tmp_path / "page.html", title="Long")
    page = Page(report.page)
    assert [row[0] for row in page.tables[0][1:]] == names
    broken = [attributes["class"] for _, attributes in page.tags if "class" in attributes]
    assert broken.count("named long") >= 4  # whole in tables, over several lines
    assert broken.count("long") == 2
    for figure in page.figures():
        texts = Texts((report.folder / f"{figure}.svg").read_text()).texts
        shortened = [text.strip() for text in texts if "\N{HORIZONTAL ELLIPSIS}" in text]
        assert {text[:2] for text in shortened} >= {"0_"}, figure
        assert max(map(len, shortened)) <= 62


def test_runs_that_logged_less_than_others(two: list[Path], tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", [without_new(record(step)) for step in range(1, 41)])
    report = write_report([old, two[0]], tmp_path / "page.html")
    assert report.left_out == {}
    text = Page(report.page).text
    assert "Without old: not logged there." in text
    assert "not logged by this run" in text


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    report = write_report(
        [write_run(tmp_path / "a", [{"step": 1, "ce": 1.0}])], tmp_path / "p.html"
    )
    page = Page(report.page)
    assert page.figures() == ["training"]
    assert list(report.left_out) == [
        "Trust gate and confidence", "Probabilities over training", "Token gradient landscape",
    ]  # fmt: skip
    for reason in report.left_out.values():
        assert f"Not shown. {reason}" in page.text


ODD: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "one step": lambda: [record(1, steps=1)],
    "nothing but a step": lambda: [{"step": 1}],
    "all broken": lambda: [
        {name: value if name == "step" else None for name, value in record(step).items()}
        | {"landscape": record(1)["landscape"]}
        for step in (1, 2)
    ],
    "no kept token": lambda: [
        {"step": 1, "loss": None, "lr": 1.0, "nonfinite": ["loss"],
         "landscape": {"vocab_size": 9, "entropy_bins": 2, "tokens": [[]], "gate_error": [[]]}}
    ],
    "a landscape of one cell": lambda: [
        {"step": 1, "loss": 0.0,
         "landscape": {"vocab_size": 9, "entropy_bins": 2, "tokens": [[0, 3]], "gate_error": [[]]}}
    ],
    "spikes": lambda: [record(step, factor=10.0 ** (step % 9)) for step in range(1, 1200)],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_have_a_page(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "odd <run>", ODD[name](), config=None)
    report = write_report([run], tmp_path / "page.html")
    page = Page(report.page)
    assert len(page.figures()) + len(report.left_out) == 4
    assert page.titles[0] == "Training report: odd <run>"


def test_over_tokens(two: list[Path], tmp_path: Path) -> None:
    report = write_report(two[:1], tmp_path / "page.html", axis="tokens", window=5)
    svg = (report.folder / "training.svg").read_text()
    assert re.search(r">\s*tokens\s*<", svg)
    assert re.search(r">\s*4k\s*<", svg)
    assert "means of 5 steps" in Page(report.page).text


def test_every_run_has_one_colour_in_every_figure(whole: Report) -> None:
    for name in ("training", "confidence", "scores", "pass_at_k"):
        svg = (whole.folder / f"{name}.svg").read_text()
        used = [colour for colour in LIGHT.runs if colour in svg]
        assert used == list(LIGHT.runs[:2]), name
    assert LIGHT.grey in (whole.folder / "scores.svg").read_text()


def test_a_second_report_takes_the_place_of_the_first(two: list[Path], tmp_path: Path) -> None:
    first = write_report(two[:1], tmp_path / "page.html")
    before = [path.read_bytes() for path in [first.page, *first.figures]]
    again = write_report(two[:1], tmp_path / "page.html")
    assert [path.read_bytes() for path in [again.page, *again.figures]] == before  # no date in it
    path = write_results(tmp_path / "results.json", results(["base"]))
    write_report([path], tmp_path / "page.html")
    left = sorted(path.name for path in (tmp_path / "page_figures").iterdir())
    assert left == ["figures.json", "scores.png", "scores.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "page.html", "page_figures", "results.json",
    }  # fmt: skip


def test_nothing_else_is_replaced(two: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="exists and is no report"):
        write_report(two, mine)
    assert mine.read_text() == "<p>mine</p>"
    with pytest.raises(UserError, match="is a folder"):
        write_report(two, tmp_path)
    (tmp_path / "page_figures").mkdir()
    with pytest.raises(UserError, match="holds no report's figures"):
        write_report(two, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_two_pages_do_not_share_their_figures(two: list[Path], tmp_path: Path) -> None:
    for name in ("page", "page.txt", "page.html.bak"):
        with pytest.raises(UserError, match=r"a page ends in .html or .htm$"):
            write_report(two, tmp_path / name)
    path = write_results(tmp_path / "results.json", results(["base"]))
    write_report([path], tmp_path / "page.html")
    for name in ("page.htm", "page.HTML"):
        with pytest.raises(UserError, match=r"page_figures holds the figures of .*page.html: cho"):
            write_report([path], tmp_path / name)
    (tmp_path / "page.htm").write_text("mine")  # no report, so it has no figures
    write_report([path], tmp_path / "page.html")
    assert write_report([path], tmp_path / "other.HTM").page.is_file()


def test_without_matplotlib(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-deft\[report\]'"):
        write_report(two)


def test_the_command(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for path in two:
        (tmp_path / path.name).symlink_to(path)
    parser = argparse.ArgumentParser()
    add_report_arguments(parser)
    assert "[2%]" in parser.format_help()
    args = parser.parse_args(["a=deft", "nll", "--title", "Mine & yours", "--smooth", "3"])
    assert run_report(args) == 0
    assert capsys.readouterr().out == (
        "report.html: a page with 4 figures; as PNG and SVG: report_figures\n"
    )
    page = Page(tmp_path / "report.html")
    assert page.titles[0] == "Mine & yours"
    assert page.tables[0][1][0] == "a"
    with pytest.raises(UserError, match="--smooth 0"):
        run_report(parser.parse_args(["deft", "--smooth", "0"]))
