"""The colours of runs, for every kind of eye and on both surfaces."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_deft.errors import UserError
from megatron_deft.report import style
from megatron_deft.report.style import DARK, DENSITY, LIGHT, PULL, Theme

# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB as a dichromat sees it.
EYES = {
    "all cones": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
    "tritanopia": np.array([
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ]),
}  # fmt: skip
Colour = NDArray[np.float64]


def linear(colour: str) -> Colour:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Colour) -> Colour:
    """Ottosson (2020): a space in which distances are as large as they look."""
    cones = np.array([
        [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ])  # fmt: skip
    mixed = np.array([
        [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ])  # fmt: skip
    return mixed @ np.cbrt(cones @ np.clip(rgb, 0, 1))


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    """Of WCAG 2.1."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_colours_of_runs_differ(theme: Theme, eye: str) -> None:
    seen = [oklab(EYES[eye] @ linear(colour)) for colour in theme.runs]
    for (i, a), (j, b) in combinations(enumerate(seen), 2):
        # of the first four, which most reports have, more is asked
        least = 0.12 if max(i, j) < 4 else 0.07
        assert np.linalg.norm(a - b) >= least, (eye, theme.runs[i], theme.runs[j])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_can_be_read(theme: Theme) -> None:
    for surface in (theme.page, theme.surface):
        assert contrast(theme.ink, surface) > 7
        assert contrast(theme.soft, surface) > 4.5
    for colour in (*theme.runs, theme.grey):
        assert contrast(colour, theme.surface) > 2.2, colour


# What the style sheet does to maps where it is dark (the matrix is that of the CSS standard).
TURN = np.array([
    [-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856],
])  # fmt: skip


def turned_round(colour: str) -> str:
    inverted = [0.92 * 255 - 0.84 * int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    values = (TURN @ inverted).round().clip(0, 255).astype(int)
    return "#" + "".join(f"{value:02x}" for value in values)


@pytest.mark.parametrize("ramp", [DENSITY, PULL])
def test_ramps_run_from_the_surface_away(ramp: tuple[str, ...]) -> None:
    for theme, colours in ((LIGHT, ramp), (DARK, [turned_round(colour) for colour in ramp])):
        contrasts = [contrast(colour, theme.surface) for colour in colours]
        assert contrasts == sorted(contrasts), colours
        assert contrasts[0] > 1.08  # a cell with little is not one without
        assert contrasts[-1] > 7


def test_every_colour_of_a_figure_has_a_name_of_its_own() -> None:
    assert LIGHT.names().keys() == DARK.names().keys()
    assert len(set(LIGHT.names().values())) == len(LIGHT.names())
    assert not set(LIGHT.names().values()) & {*DENSITY, *PULL}


def test_beyond_eight_runs_lines_are_dashed_and_beyond_all_refused() -> None:
    looks = {(style.colour(slot), style.dash(slot)) for slot in range(32)}
    assert len(looks) == 32
    style.check_count(32)
    with pytest.raises(UserError, match="33 runs and models"):
        style.check_count(33)
