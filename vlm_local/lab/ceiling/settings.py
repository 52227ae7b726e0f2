"""What is varied between the oracle's phrase and the arm, and the curves that are drawn of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_local.grammar import DEFAULT

MISSED, OPPOSITE = "missed", "opposite"
ALL = "all"
USUAL, WIDE = "usual precision", "rests sooner"
_MOST_REST = 2.4  # 18 mm, which is what `reach` forgives


@dataclass(frozen=True)
class Setting:
    """One way of carrying out what the oracle says. The defaults are the server's own.

    scale: factor of all step sizes. rest: factor of the step sizes that the oracle assumes: an axis rests within 0.6
    of these. hold: control steps for which a phrase is kept (policy.HoldPhrase). latency: the executed phrase
    answers the observation of this many control steps ago; until the first answer the arm stands still. grammar:
    the vocabulary (play.build_projection). axis: of types.AXES or "all"; kind: "missed" (the axis says nothing) or
    "opposite"; rate: share of the steps in which the axis should move that are wrong, chosen at random.
    """

    scale: float = 1.0
    rest: float = 1.0
    hold: int = 1
    latency: int = 0
    grammar: str = DEFAULT
    axis: str = ALL
    kind: str = MISSED
    rate: float = 0.0


PLAIN = Setting()


@dataclass(frozen=True)
class Curve:
    """A line of a figure: one value of a study varied, `xs[i]` with `settings[i]`. line: its name in the figure."""

    study: str
    line: str
    xs: tuple[float, ...]
    settings: tuple[Setting, ...]


STUDIES = {
    "scale": "step size, times 0.0125 m and 0.125 rad",
    "hold": "control steps a phrase is held",
    "latency": "latency in control steps of 0.2 s",
    "vocabulary": "phrases in the vocabulary",
    MISSED: "share of moving steps that say nothing",
    OPPOSITE: "share of moving steps that say the opposite",
}
ERROR_AXES = ("x", "y", "z", "gripper", ALL)
TABLE_RATE = 0.05  # of the table of losses
_RATES = (0.0, 0.01, 0.02, TABLE_RATE, 0.1, 0.2, 0.4)
_VOCABULARIES = {27: "primitives_moves", 513: "primitives_labelable", 729: DEFAULT}


def list_curves() -> list[Curve]:
    return [
        *_list_rests("scale", (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0), lambda scale: scale),
        *_list_rests("hold", (1, 2, 3, 4, 6, 8), lambda hold: hold),
        *_list_rests("latency", (0, 1, 2, 3, 4, 6), lambda latency: 1 + latency),
        Curve("vocabulary", "", tuple(_VOCABULARIES), tuple(Setting(grammar=name) for name in _VOCABULARIES.values())),
        *(
            Curve(kind, axis, _RATES, tuple(build_error(axis, kind, rate) for rate in _RATES))
            for kind in (MISSED, OPPOSITE)
            for axis in ERROR_AXES
        ),
    ]


def _set(study: str, value: Any, **more: Any) -> Setting:
    return Setting(**{study: value, **more})


def _list_rests(study: str, xs: tuple[float, ...], reckon: Callable[[float], float]) -> list[Curve]:
    """A curve for two oracles: of the usual precision, and one that rests within 0.6 of what a phrase moves.

    reckon: a value of xs -> steps of 0.0125 m that the arm goes before another phrase can stop it.
    """
    return [
        Curve(study, USUAL, xs, tuple(_set(study, x) for x in xs)),
        Curve(study, WIDE, xs, tuple(_set(study, x, rest=min(float(reckon(x)), _MOST_REST)) for x in xs)),
    ]


def build_error(axis: str, kind: str, rate: float) -> Setting:
    """An axis that is wrong in a share `rate` of its moving steps. A rate of 0 is PLAIN, so that it is played once."""
    return Setting(axis=axis, kind=kind, rate=rate) if rate else PLAIN


def list_settings(curves: Sequence[Curve]) -> list[Setting]:
    """Each once, the plain one first."""
    return list(dict.fromkeys([PLAIN, *(setting for curve in curves for setting in curve.settings)]))
