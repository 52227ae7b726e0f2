"""A comparison as files for a paper: Markdown, CSV and LaTeX tables, figures as PDF and SVG."""

import csv
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vlm_local.files import open_replacing, write_json
from vlm_local.lab import pages
from vlm_local.lab.comparison import (
    OVERALL,
    describe_methods,
    format_difference,
    format_score,
    format_score_span,
)
from vlm_local.lab.conditions import describe_conditions, describe_trials
from vlm_local.lab.formats import format_p

_WIDTH_IN = 3.5  # a column of a page with two
_SURE = 0.05  # a p-value below it is drawn full
_COLOURS = (pages.BLUE, pages.ORANGE, pages.GREEN, pages.GREY, pages.RED, pages.LIGHT_BLUE)
_PATTERNS = ("", "///", "...", "xxx", "+++")
_PAPER: Any = {
    "font.size": 7,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # letters, not outlines: publishers refuse Type 3
}
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}", "`": r"\textasciigrave{}"},
}
_GREEK = (  # those that have a command; the others look like Latin ones
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
)
_LATEX |= zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ", (f"$\\{name}$" for name in _GREEK.split()), strict=True)


def write_publication(folder: Path, result: Mapping[str, Any], made_with: Mapping[str, Any]) -> list[Path]:
    """Write a comparison's files into `folder`; returns their paths.

    result: `comparison.compare`. made_with: versions, git and machine of this comparison. Raises ConfigError where
    nothing can be written.
    """
    write_json(folder / "comparison.json", {**result, **made_with})
    texts = {
        "comparison.md": _build_markdown(result),
        "comparison.tex": _build_latex(result),
    }
    for name, text in texts.items():
        with open_replacing(folder / name) as file:
            file.write(text)
    tables = {"scores.csv": _list_scores(result), "differences.csv": _list_differences(result)}
    for name, table in tables.items():
        with open_replacing(folder / name) as file:
            csv.writer(file, lineterminator="\n").writerows(table)
    figures = {"differences": _draw_differences(result)}
    groups = dict.fromkeys(measure["group"] for measure in _list_measures(result) if measure["group"] != OVERALL)
    figures |= {f"by_{group}": _draw_bars(result, group) for group in groups}
    drawn = [path for name, figure in figures.items() for path in _save(figure, folder / name)]
    return [folder / name for name in ("comparison.json", *texts, *tables)] + drawn


def _list_measures(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those that have a trial."""
    return [measure for measure in result["measures"] if measure["n"]]


def _names(result: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> name."""
    return {told["letter"]: told["name"] for told in result["results"]}


def _list_scores(result: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Rows of scores.csv, the head first."""
    yield "measure", "group", "result", "n", "value", "low", "high"
    for measure in _list_measures(result):
        for told, score in zip(result["results"], measure["scores"], strict=True):
            low, high = score["interval"] or ("", "")
            yield measure["name"], measure["group"], told["name"], measure["n"], score["value"], low, high


def _list_differences(result: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Rows of differences.csv, the head first."""
    yield "measure", "group", "first", "second", "n", "difference", "low", "high", "p_value", "p_holm"
    names = _names(result)
    for measure in _list_measures(result):
        for pair in measure["pairs"]:
            low, high = pair["interval"] or ("", "")
            sides = names[pair["first"]], names[pair["second"]]
            numbers = pair["difference"], low, high, pair["p_value"], pair["p_holm"]
            yield measure["name"], measure["group"], *sides, measure["n"], *numbers


def _fill_scores(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of the table of scores: measure, n, and a score with its interval for each result."""
    yield "measure", "n", *_names(result).values()
    for measure in _list_measures(result):
        cells = []
        for score in measure["scores"]:
            span = format_score_span(measure, score["interval"])
            cells.append(format_score(measure, score["value"]) + (f" ({span})" if span else ""))
        yield measure["name"], str(measure["n"]), *cells


def _fill_differences(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of the table of differences: measure, pair, difference, interval, p, and for several pairs Holm's p."""
    several = len(result["results"]) > 2
    yield "measure", "first - second", "difference", "95 %", "p", *["Holm"] * several
    names = _names(result)
    for measure in _list_measures(result):
        for pair in measure["pairs"]:
            sides = f"{names[pair['first']]} - {names[pair['second']]}"
            adjusted = [format_p(pair["p_holm"])] * several
            yield measure["name"], sides, *format_difference(measure, pair), format_p(pair["p_value"]), *adjusted


def _build_markdown(result: Mapping[str, Any]) -> str:
    tables = [_build_markdown_table(list(fill(result))) for fill in (_fill_scores, _fill_differences)]
    methods = describe_methods(result).replace("\n", " ")
    told = " ".join([f"{describe_trials(result)}.", *describe_conditions(result)])
    return "\n\n".join(["# Comparison", told, *tables, methods]) + "\n"


def _build_markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    marks = " | ".join(["---", *["---:"] * (len(rows[0]) - 1)])
    return "\n".join(f"| {line} |" for line in (head, marks, *lines))


def _build_latex(result: Mapping[str, Any]) -> str:
    """Two tables, of scores and of differences, each to be put into a table of the paper's own."""
    scores = _build_latex_table(list(_fill_scores(result)), "lr" + "r" * len(result["results"]))
    lines = list(_fill_differences(result))
    differences = _build_latex_table(lines, "ll" + "r" * (len(lines[0]) - 2))
    notes = ["Needs \\usepackage{booktabs} in the preamble."]
    foreign = sorted({letter for letter in scores if not letter.isascii()})
    if foreign:
        notes.append(f"If pdflatex does not know {' '.join(foreign)}: lualatex or xelatex, in a font that has it.")
    notes += [describe_trials(result), *describe_conditions(result), *describe_methods(result).split("\n")]
    comment = "\n".join(f"% {note}" for note in notes)
    return f"{comment}\n\n{scores}\n\n{differences}\n"


def _build_latex_table(rows: Sequence[Sequence[str]], columns: str) -> str:
    """A line between measures, so that the pairs of one stand together."""
    lines = [" & ".join(map(_escape_latex, row)) + r" \\" for row in rows]
    body = []
    for index, line in enumerate(lines[1:], 1):
        starts = rows[index][0] != rows[index - 1][0]
        if index > 1 and starts and rows[index - 1][0] == rows[index - 2][0]:
            body.append(r"\addlinespace")
        body.append(line)
    inside = "\n".join([r"\toprule", lines[0], r"\midrule", *body, r"\bottomrule"])
    return f"\\begin{{tabular}}{{{columns}}}\n{inside}\n\\end{{tabular}}"


def _escape_latex(text: str) -> str:
    """Names as they are; minus signs of numbers and differences as such, not as hyphens."""
    escaped = "".join(map(_escape_letter, text)).replace(r" \%", r"~\%")
    escaped = re.sub(r"(?<!\w)-(?=\d)|(?<= )-(?= )", "$-$", escaped)
    return re.sub("-(?=-)", "-{}", escaped)  # two would become a dash


def _escape_letter(letter: str) -> str:
    """Small raised and lowered digits, as in π₀, are no letters to pdflatex."""
    tag, *codes = unicodedata.decomposition(letter).split() or [""]
    sign = {"<sub>": "_", "<super>": "^"}.get(tag)
    plain = "".join(chr(int(code, 16)) for code in codes) if sign else ""
    return f"${sign}{{{plain}}}$" if plain and plain.isascii() else _LATEX.get(letter, letter)


@pages.styled
@matplotlib.rc_context(_PAPER)
def _draw_differences(result: Mapping[str, Any]) -> Figure:
    """Forest plot of the overall measures: a line a pair."""
    overall = [measure for measure in _list_measures(result) if measure["group"] == OVERALL]
    names = _names(result)
    pairs = [(measure, pair) for measure in overall for pair in measure["pairs"]]
    scale = 100 if overall[0]["is_share"] else 1
    figure = Figure(figsize=(_WIDTH_IN, 0.55 + 0.17 * (len(pairs) + len(overall))), layout="constrained")
    plot = figure.subplots()
    plot.axvline(0, color=pages.GREY, linewidth=0.6, linestyle="--")
    row, labels = 0, []
    for measure in overall:
        note = ", lower is better" if measure["lower_is_better"] else ""
        labels.append((row, measure["name"] + note, "bold"))
        for pair in measure["pairs"]:
            row += 1
            labels.append((row, f"{names[pair['first']]} \N{MINUS SIGN} {names[pair['second']]}", "normal"))
            colour = pages.BLUE if pair["p_holm"] < _SURE else pages.GREY
            if pair["interval"]:
                plot.plot([scale * edge for edge in pair["interval"]], [row, row], color=colour, linewidth=1.2)
            plot.plot(scale * pair["difference"], row, "o", color=colour, markersize=3.5)
        row += 1
    plot.set_yticks([at for at, _, _ in labels], [text for _, text, _ in labels])
    for tick, (_, _, weight) in zip(plot.get_yticklabels(), labels, strict=True):
        tick.set(fontweight=weight, color=pages.BLACK)
    plot.tick_params(axis="y", length=0)
    plot.spines["left"].set_visible(False)
    plot.set_ylim(row - 0.4, -0.6)
    unit = "difference in percentage points" if scale == 100 else "difference"
    adjusted = "Holm's p" if len(names) > 2 else "p"
    figure.supxlabel(f"{unit} (blue: {adjusted} < {_SURE})", fontsize="medium")
    return figure


@pages.styled
@matplotlib.rc_context(_PAPER)
def _draw_bars(result: Mapping[str, Any], group: str) -> Figure:
    """The measures of one group, a bar for each result, with 95 % intervals."""
    measures = [measure for measure in _list_measures(result) if measure["group"] == group]
    scale = 100 if measures[0]["is_share"] else 1
    count = len(result["results"])
    height = 0.8 / count
    figure = Figure(figsize=(_WIDTH_IN, 0.6 + len(measures) * (0.12 + 0.11 * count)), layout="constrained")
    plot = figure.subplots()
    bars: list[Any] = []
    for index in range(count):
        rows = [at + (index - (count - 1) / 2) * height for at in range(len(measures))]
        scores = [measure["scores"][index] for measure in measures]
        pattern = _PATTERNS[index // len(_COLOURS) % len(_PATTERNS)]
        style = {"color": _COLOURS[index % len(_COLOURS)], "hatch": pattern, "edgecolor": "white", "linewidth": 0}
        bars.append(plot.barh(rows, [scale * score["value"] for score in scores], 0.92 * height, **style))
        for row, score in zip(rows, scores, strict=True):
            if score["interval"]:
                plot.plot([scale * edge for edge in score["interval"]], [row, row], color=pages.BLACK, linewidth=0.7)
    floors = [(row, scale * measure["floor"]) for row, measure in enumerate(measures) if "floor" in measure]
    for row, floor in floors:
        style = {"color": pages.BLACK, "linestyle": ":", "linewidth": 1.2, "clip_on": False}
        bars += plot.plot([floor, floor], [row - 0.46, row + 0.46], **style)
    plot.set_yticks(range(len(measures)), [measure["name"].replace("_", " ") for measure in measures])
    plot.tick_params(axis="y", length=0, labelcolor=pages.BLACK)
    plot.invert_yaxis()
    if scale == 100:
        plot.set_xlim(0, 100)
    plot.set_xlabel("share, %" if scale == 100 else "score")
    names = list(_names(result).values())  # not as labels of the bars: one such as "_old" would be left out
    names += ["“stop” alone"] * bool(floors)
    figure.legend(bars[: len(names)], names, frameon=False, loc="outside upper left", ncols=2)
    return figure


@pages.styled
@matplotlib.rc_context(_PAPER)
def _save(figure: Figure, path: Path) -> list[Path]:
    """As PDF and SVG; the same figure gives the same bytes."""
    dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    for suffix, metadata in dates.items():
        figure.savefig(path.with_suffix(suffix), metadata=metadata)
    return [path.with_suffix(suffix) for suffix in dates]
