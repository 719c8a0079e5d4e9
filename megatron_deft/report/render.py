"""A figure as files, and as SVG inside a page."""

from __future__ import annotations

import re
import warnings
from html import escape
from pathlib import Path

from matplotlib import rc_context

from megatron_deft.report.draw import settings
from megatron_deft.report.plots import Plot
from megatron_deft.report.style import LIGHT

DPI = 150
# Neither a date nor matplotlib's address: the same figure is the same file.
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def render(plot: Plot, folder: Path) -> str:
    """Write NAME.svg and NAME.png into `folder`; return the SVG as an element of a page."""
    path = folder / f"{plot.name}.svg"
    with rc_context(settings()), warnings.catch_warnings():
        # a page's reader has the letters that matplotlib's font lacks; in the PNG they are boxes
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = plot.draw()
        # the layout is half of the work: once, not for every file
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(path, metadata=_NO_METADATA)
        figure.savefig(folder / f"{plot.name}.png", dpi=DPI)
    return inline(path.read_text(encoding="utf-8"), plot)


def inline(svg: str, plot: Plot) -> str:
    """An SVG file as an element of a page.

    Without prolog and addresses of schemes, which HTML does not need; without ids that nothing
    refers to, the others such as no other figure has; in the page's font and the theme's colours,
    as wide as it may be.
    """
    opening = re.search(r"<svg\b[^>]*>", svg)
    assert opening is not None
    box = re.search(r'viewBox="[^"]+"', opening[0])
    assert box is not None
    body = svg[opening.end() :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{plot.name}-", body)
    body = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]+", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    for name, colour in LIGHT.names().items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {box[0]} role="img" aria-label="{escape(plot.title, quote=True)}">{body}'
