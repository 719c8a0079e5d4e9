"""Colours of the page and of the figures, for a light and a dark surface.

Figures are drawn once, in the light colours; in the page these are names of the theme's, and maps
are turned inside out where it is dark. The colours of runs differ for people with protanopia,
deuteranopia and tritanopia too (a test computes it); beyond eight runs lines are dashed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_deft.errors import UserError


@dataclass(frozen=True)
class Theme:
    """What everything is drawn with; colours as #rrggbb, each another.

    ink, soft, faint:  text, labels, and what only separates
    grey, runs:        of a base, and one colour per run
    """

    page: str
    surface: str
    ink: str
    soft: str
    faint: str
    grey: str
    runs: tuple[str, ...]

    def names(self) -> dict[str, str]:
        """Name of each colour in the page's style sheet -> colour."""
        named = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "runs"}
        return named | {f"run-{place}": colour for place, colour in enumerate(self.runs)}


LIGHT = Theme(
    page="#f6f6f3",
    surface="#ffffff",
    ink="#14171a",
    soft="#565c63",
    faint="#e3e5e6",
    grey="#7d838a",
    runs=("#3a67d0", "#bb731d", "#1dbfa1", "#9f2367", "#c69f32", "#279abd", "#5e34a3", "#772e11"),
)
DARK = Theme(
    page="#111315",
    surface="#191c1f",
    ink="#f2f3f4",
    soft="#b3b9bf",
    faint="#33383d",
    grey="#8d949b",
    runs=("#5b8df9", "#fa960b", "#44f7d4", "#ba3f7f", "#f9d630", "#4fc5fc", "#7f59cb", "#e7624b"),
)
# From little to much, of token density and of gradient.
DENSITY = ("#d6e6f9", "#a9cbf2", "#5a97e0", "#2563b4", "#123a75", "#0a1f42")
PULL = ("#fce4d0", "#f8bd8d", "#ea7a36", "#b9440f", "#742506", "#3c1203")
DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def colour_name(slot: int | None) -> str:
    """What the colour of a run or model is called in the style sheet."""
    return "grey" if slot is None else f"run-{slot % len(LIGHT.runs)}"


def colour(slot: int | None) -> str:
    """The colour of a run or model; None is grey."""
    return LIGHT.names()[colour_name(slot)]


def dash(slot: int | None) -> object:
    """The line of a run, as matplotlib has it: solid for the first eight."""
    return DASHES[0] if slot is None else DASHES[slot // len(LIGHT.runs)]


def check_count(names: int) -> None:
    """Errors: UserError for more runs than can be told apart."""
    most = len(LIGHT.runs) * len(DASHES)
    if names > most:
        raise UserError(f"{names} runs and models: a report tells at most {most} apart; name fewer")


_BOTH = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
 overflow-wrap:break-word;
 font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 font-size:15px;-webkit-text-size-adjust:100%}
main{max-width:1140px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:20px;margin:48px 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:24px 0 6px}
p{margin:6px 0;max-width:76ch}
.soft,.note,figcaption{color:var(--soft)}
.note{font-size:13px}
.lead{font-size:16px;margin-bottom:0}
.card,figure{background:var(--surface);border:1px solid var(--faint);border-radius:12px;
 margin:14px 0;padding:8px 20px}
figure{padding:16px 20px 14px}
figcaption{font-size:13.5px;margin-top:10px;max-width:92ch}
.scroll{overflow-x:auto}
.plot{min-width:640px}
.plot svg{width:100%;height:auto;vertical-align:top}
.plot svg *{stroke-linejoin:round;stroke-linecap:butt}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:9px 22px 9px 0;border-top:1px solid var(--faint)}
th:last-child,td:last-child{padding-right:0}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
tbody th{font-weight:600}
td.number,th.number{text-align:right;white-space:nowrap}
td small{display:block;color:var(--soft);font-size:12.5px}
td.key,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px}
.wrap{overflow-wrap:anywhere;min-width:13ch}
.named{display:inline-flex;align-items:baseline}
.long{overflow-wrap:anywhere;min-width:24ch;white-space:normal}
.chip{flex:none;width:11px;height:11px;border-radius:3px;margin-right:8px}
.sure{font-weight:650;color:var(--ink)}
.missing{border:1px dashed var(--faint);border-radius:12px;padding:10px 20px;margin:14px 0;
 color:var(--soft)}
ul{margin:6px 0;padding-left:20px}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--faint);color:var(--soft);
 font-size:13px}
"""
_NARROW = "@media(max-width:640px){main{padding:24px 14px}.card,figure{padding:8px 14px}}"
_PRINT = """
body{background:none;font-size:10.5pt}
main{max-width:none;padding:0}
h1{font-size:20pt}h2{font-size:14pt;margin-top:18pt;break-after:avoid}h3{break-after:avoid}
figure,.card,tr{break-inside:avoid}
.plot{min-width:0}.scroll{overflow:visible}
table{font-size:8.5pt}th,td{padding-right:10pt}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
"""


def _variables(theme: Theme) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in theme.names().items())


def stylesheet() -> str:
    """The page's CSS: light, dark where the reader's system is, and light again on paper."""
    return "\n".join(
        (
            f":root{{color-scheme:light;{_variables(LIGHT)}}}",
            "@media screen and (prefers-color-scheme:dark){",
            f":root{{color-scheme:dark;{_variables(DARK)}}}",
            # lightness turned round, hues kept; the surface is not black, so neither is little
            "image{filter:invert(.92) hue-rotate(180deg)}}",
            _BOTH.strip(),
            _NARROW,
            f"@media print{{{_PRINT}}}",
        )
    )
