"""Which figures there are, and what is said beside them; nothing is drawn."""

from pathlib import Path
from typing import Any

from megatron_deft.report import draw, plots
from megatron_deft.report.plots import LeftOut, Part, Plot
from megatron_deft.report.runs import Run, find, read_runs
from megatron_deft.report.scores import read_results
from tests.report.made import interval, record, results, without_new, write_results, write_run

SLOTS = {"base": None, "deft": 0}
Lines = list[dict[str, Any]]


def read(folder: Path, **lines: Lines) -> list[Run]:
    return read_runs([find(str(write_run(folder / name, one))) for name, one in lines.items()])


def of(runs: list[Run]) -> list[Part]:
    return plots.of_runs(runs, {run.name: i for i, run in enumerate(runs)}, "steps", None)


def lines(count: int = 40) -> Lines:
    return [record(step, count) for step in range(1, count + 1)]


def test_every_figure_of_a_run(tmp_path: Path) -> None:
    parts = of(read(tmp_path, a=lines()))
    assert [part.name for part in parts if isinstance(part, Plot)] == [
        "training", "confidence", "probabilities", "landscape",
    ]  # fmt: skip
    assert all("Without" not in part.caption for part in parts if isinstance(part, Plot))
    assert plots.of_runs([], {}, "steps", None) == []


def test_metrics_of_older_versions(tmp_path: Path) -> None:
    old = [without_new(line) for line in lines()]
    older = [{k: v for k, v in line.items() if "histogram" not in k} for line in old]
    *_, histograms, landscape = of(read(tmp_path, old=old))
    assert isinstance(histograms, Plot)
    assert "Without p, whose histogram no run logged" in histograms.caption
    assert isinstance(landscape, LeftOut)
    assert "monitor.landscape_every" in landscape.reason
    *_, histograms, landscape = of(read(tmp_path, older=older))
    assert isinstance(histograms, LeftOut)
    assert "histograms of p or of the gate" in histograms.reason
    *_, histograms, landscape = of(read(tmp_path, old=old, older=older, new=lines()))
    assert isinstance(histograms, Plot)
    assert isinstance(landscape, Plot)
    assert histograms.caption.endswith("Without older: not logged there.")
    assert landscape.caption.endswith("Without old, older: not logged there.")


def test_validation_and_smoothing_are_told(tmp_path: Path) -> None:
    trained = [{k: v for k, v in line.items() if k[:4] != "val_"} for line in lines()]
    part = of(read(tmp_path, a=trained))[0]
    assert isinstance(part, Plot)
    assert "no run has validation data" in part.caption
    assert "Every step is shown as it was logged." in part.caption
    part = of(read(tmp_path, b=lines(400), c=lines(1000)))[0]
    assert isinstance(part, Plot)
    assert "Strong lines are means of 9 to 21 steps" in part.caption


def test_figures_of_several_results_have_names_of_their_own(tmp_path: Path) -> None:
    paths = [
        write_results(tmp_path / f"{samples}.json", results(["base", "deft"], samples=samples))
        for samples in (1, 4)
    ]
    found = read_results([find(str(path)) for path in paths])
    made = [part for i, one in enumerate(found, 1) for part in plots.of_results(one, i, {})]
    assert [part.name for part in made] == ["scores", "scores_2", "pass_at_k_2"]


def test_passes_of_nothing_begin_at_zero_and_end_with_a_tick(tmp_path: Path) -> None:
    content = results(["base", "deft"], samples=12)
    for model in content["models"].values():
        model["scores"] = {key: interval(0.0, 0.0) for key in model["scores"]}
    found = read_results([find(str(write_results(tmp_path / "results.json", content)))])[0]
    (axes,) = draw.pass_curves(found, SLOTS).axes
    assert axes.get_ylim() == (0.0, 1.0)
    assert list(axes.get_xticks()) == [1, 2, 4, 8, 12]
    for panel in draw.scores(found, SLOTS).axes:
        assert panel.get_xlim() == (-0.16, 1.0)


def test_ticks_of_pass_at_k_do_not_stand_on_one_another(tmp_path: Path) -> None:
    for samples, ticks in ((2, [1, 2]), (9, [1, 2, 4, 9]), (33, [1, 2, 4, 8, 16, 33])):
        path = write_results(tmp_path / "results.json", results(["base"], samples=samples))
        (axes,) = draw.pass_curves(read_results([find(str(path))])[0], SLOTS).axes
        assert list(axes.get_xticks()) == ticks
        low, high = axes.get_ylim()
        assert 0 < low < 20 < high


def test_a_long_name_loses_its_middle() -> None:
    assert draw.brief("a" * 40) == "a" * 40
    assert draw.brief("a" * 30 + "b" * 30) == "a" * 20 + "\N{HORIZONTAL ELLIPSIS}" + "b" * 19
    assert len(draw.brief("x" * 99, 21)) == 21
