"""Reading results: both shapes of the file, which metrics are shown, whose colour is whose."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.errors import UserError
from megatron_deft.report.runs import find, read_runs
from megatron_deft.report.scores import (
    Results,
    colour_slots,
    metric_label,
    read_results,
    shown,
    told_by_set,
)
from tests.report.made import interval, results, write_results, write_run

QUICKSTART = Path(__file__).parents[2] / "examples" / "results" / "quickstart.json"


def read(*arguments: Path | str) -> list[Results]:
    return read_results([find(str(argument)) for argument in arguments])


def test_the_committed_results_of_the_quickstart() -> None:
    found = read(QUICKSTART)[0]
    recorded = json.loads(QUICKSTART.read_text())["models"]
    assert [model.label for model in found.models] == list(recorded)
    assert found.metrics == ["exact", "normalised", "jaro_winkler"]
    assert (found.title, found.sets) == ("figfont", [])
    assert found.models[0].scores["exact"].delta is None
    delta = found.models[1].scores["exact"].delta
    assert delta is not None
    assert delta.mean == recorded["deft"]["scores"]["exact"]["delta"]["mean"]


def test_sets_and_pass_at_k(tmp_path: Path) -> None:
    content = results(["base", "deft"], ("aime24", "amc23"), samples=12)
    found = read(f"maths={write_results(tmp_path / 'results.json', content)}")[0]
    assert found.title == "maths"
    assert read(tmp_path)[0].title == "Competition maths"
    assert found.sets == ["aime24", "amc23"]
    assert found.models[1].sets["amc23"]["avg@12"].value.mean == pytest.approx(0.35)
    assert shown(found.metrics) == ["avg@12", *(f"pass@{k}" for k in (1, 2, 4, 8, 12))]
    assert told_by_set(shown(found.metrics)) == ["avg@12", "pass@12"]
    assert metric_label("jaro_winkler") == "Jaro-Winkler"
    assert metric_label("pass@4") == "pass@4"


FINE = {"exact": interval(0.5)}
BROKEN: dict[str, Any] = {
    "no JSON": "{",
    "a list": [1],
    "no models": {"task": "math", "models": {}},
    "no scores": {"task": "math", "models": {"base": {"path": "x"}}},
    "empty scores": {"task": "math", "models": {"base": {"scores": {}}}},
    "data is a list": {"data": [1], "task": "math", "models": {"base": {"scores": FINE}}},
    "settings are a word": {"settings": "ab", "task": "math", "models": {"base": {"scores": FINE}}},
    "no interval": {"task": "math", "models": {"base": {"scores": {"exact": {"mean": 1}}}}},
    "scores that are numbers": {"task": "math", "models": {"base": {"scores": {"exact": 1}}}},
}


def test_the_intact_half_of_the_broken_ones(tmp_path: Path) -> None:
    models = {"base": {"scores": FINE}, "later": {"scores": {}}}
    path = write_results(tmp_path / "results.json", {"task": "math", "models": models})
    assert [len(model.scores) for model in read(path)[0].models] == [1, 0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / "results.json", BROKEN[name]
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match="evaluate --out") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_model_has_the_colour_of_its_run(tmp_path: Path) -> None:
    runs = read_runs([find(str(write_run(tmp_path / name))) for name in ("deft", "nll", "eaft")])
    content = results(["base", "deft", "second", "other", "third"])
    content["models"]["second"]["path"] = str(tmp_path / "nll" / "hf" / "step_4")
    content["models"]["third"]["path"] = str(tmp_path / "nll" / "hf" / "step_8")
    slots = colour_slots(runs, read(write_results(tmp_path / "results.json", content)))
    assert slots == {
        "deft": 0, "nll": 1, "eaft": 2, "base": None, "second": 1, "other": 3, "third": 4,
    }  # fmt: skip
