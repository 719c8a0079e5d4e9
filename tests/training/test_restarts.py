"""Ranks that are killed -9, at any moment: the run ends as if nothing had happened."""

from pathlib import Path

import pytest

from megatron_deft.training import restarts
from megatron_deft.training.restarts import Attempt
from tests.training.killing import Kill, draw, run_and_kill, values, write_config

STEPS, EVERY = 60, 5


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(base, tmp_path_factory.mktemp("restarts"), STEPS, EVERY)


def train(config: Path, run_dir: Path, kills: list[Kill], *command: str) -> str:
    log = run_dir.parent / f"{run_dir.name}.log"
    code = run_and_kill([*command, str(config), f"run_dir={run_dir}"], run_dir, log, kills)
    assert code == 0, log.read_text()[-5000:]
    return log.read_text()


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> list[dict[str, float]]:
    run_dir = config.parent / "undisturbed"
    train(config, run_dir, [], "megatron_deft", "train", "--nproc-per-node", "2")
    lines = values(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines


def check_left(run_dir: Path) -> None:
    """Nothing of the dead is left beside the run's own last two checkpoints."""
    names = [f"step_{step:08d}" for step in (STEPS - EVERY, STEPS)]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", *names]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == names[-1]


def test_twenty_kills_change_nothing(config, undisturbed):
    moments = {"start": 2, "step": 9, "save": 9}
    kills = draw(20, moments, ranks=2, last=STEPS - 1, every=EVERY)
    run_dir = config.parent / "killed"
    agent = ["megatron_deft", "train", "--nproc-per-node", "2", "--max-restarts", "30"]
    log = train(config, run_dir, kills, *agent)
    assert log.count("with SIGKILL") >= len(kills)
    assert values(run_dir) == undisturbed
    check_left(run_dir)


def test_plain_torchrun_starts_again_too(config, undisturbed):
    """Saves are in the background here."""
    kills = [Kill("save", 10, 0, 0.05), Kill("save", 30, 1, 0.02), Kill("step", 52, 1, 0.05)]
    run_dir = config.parent / "torchrun"
    agent = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "4"]
    own = run_dir.parent / "background.yaml"
    own.write_text(config.read_text() + "checkpoint: {async_save: true}\n")
    log = train(own, run_dir, kills, *agent, "-m", "megatron_deft.train")
    assert "attempt 2 of this job: train.resume is auto, not no as for the first" in log
    assert values(run_dir) == undisturbed
    check_left(run_dir)


@pytest.mark.parametrize(
    ("asked", "number", "has_own", "used"),
    [
        ("no", 1, True, "no"),
        ("no", 2, True, "auto"),
        ("no", 2, False, "auto"),
        ("must", 2, True, "must"),
        ("auto", 2, False, "auto"),
        ("/runs/a/checkpoints/step_00000005", 1, True, "/runs/a/checkpoints/step_00000005"),
        ("/runs/a/checkpoints/step_00000005", 2, False, "/runs/a/checkpoints/step_00000005"),
        ("/runs/a/checkpoints/step_00000005", 2, True, "auto"),
    ],
)
def test_what_resume_means_to_an_attempt(tmp_path, asked, number, has_own, used):
    attempt = Attempt(tmp_path, frozenset({"a"}), number, has_own)
    assert attempt.resume(asked) == used
    assert any(used in note for note in attempt.notes(asked)) == (number > 1)


def test_only_an_agent_that_was_there_makes_it_the_same_job(tmp_path):
    first = frozenset({"host1:/tmp/a", "host2:/tmp/b"})
    assert restarts._number(tmp_path, first) == 1
    Attempt(tmp_path, first).begin()
    assert restarts._number(tmp_path, first) == 2
    assert restarts._number(tmp_path, frozenset({"host2:/tmp/b", "host1:/tmp/c"})) == 2
    assert restarts._number(tmp_path, frozenset({"host1:/tmp/c", "host2:/tmp/d"})) == 1
    assert restarts._number(tmp_path, frozenset()) == 1
    (tmp_path / restarts.NAME).write_text("[1, 2")
    assert restarts._number(tmp_path, first) == 1
