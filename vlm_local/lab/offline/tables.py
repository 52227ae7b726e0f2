"""Results as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_PHRASES = 20


def format_report(report: Mapping[str, Any]) -> str:
    """The policy's headline scores, its baselines' below."""
    lines = [
        f"{report['steps']} steps of {report['episodes']} episodes, {len(report['left_out'])} left out",
        f"{'':24}{'exact':>8}  {'95 %':>12}{'moving':>9}{'all axes':>10}{'opposite':>10}{'lead':>8}{'p':>8}",
        _format_scores(report["policy"]["name"], report),
    ]
    lines += [_format_scores(name.replace("_", "-"), scores) for name, scores in report["baselines"].items()]
    lines.append("lead: of the policy over the baseline in percentage points; p: permutation test over episodes")
    if report["unanswered"]:
        lines.append(f"{report['unanswered']} steps got no answer and count as wrong")
    return "\n".join(lines)


def _format_scores(name: str, scores: Mapping[str, Any]) -> str:
    exact, moving, axes, opposite = map(
        format_share, (scores["exact"], scores["moving"]["exact"], scores["axis_accuracy"], scores["opposite"])
    )
    interval = _format_interval(scores["intervals"].get("exact"), "{:.0f} to {:.0f}")
    line = f"{name[:23]:24}{exact:>8}  {interval:>12}{moving:>9}{axes:>10}{opposite:>10}"
    lead = scores.get("lead")
    return f"{line}{100 * lead['difference']:+8.1f}{format_p(lead['p_value']):>8}" if lead else line


def format_comparison(result: Mapping[str, Any], ours: str, theirs: str) -> str:
    """`compare_rows` as a table; a line is a score."""
    lines = [
        f"A {ours}\nB {theirs}\n{result['steps']} shared steps; A - B in percentage points\n",
        f"{'':10}{'steps':>7}{'A':>9}{'B':>9}{'A - B':>9}  {'95 %':>16}{'p':>8}",
    ]
    for name, scores in result.items():
        if name == "steps":
            continue
        if scores is None:
            lines.append(f"{name:10}{0:7}")
            continue
        shares = (
            f"{format_share(scores['ours']):>9}{format_share(scores['theirs']):>9}{100 * scores['difference']:+9.1f}"
        )
        interval = _format_interval(scores["interval"], "{:+.1f} to {:+.1f}")
        lines.append(f"{name:10}{scores['steps']:7}{shares}  {interval:>16}{format_p(scores['p_value']):>8}")
    lines.append("\nexact, moving: phrases that are right; axes: signs that are right")
    lines.append("p: permutation test over episodes, two-sided, one test a line")
    return "\n".join(lines)


def format_share(share: float | None) -> str:
    return "too few" if share is None else f"{share:.1%}"


def format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _format_interval(interval: Sequence[float] | None, pattern: str) -> str:
    return "" if interval is None else pattern.format(100 * interval[0], 100 * interval[1])


def format_calibration(cells: Sequence[Mapping[str, Any]], phrases: Sequence[Mapping[str, Any]]) -> str:
    """`calibrate.list_cells` and the commonest of `calibrate.list_phrase_actions`."""
    lines = [f"{'label':26}{'steps':>8}  {'motion a step':>20}  {'commanded':>20}"]
    for cell in cells:
        motion, action = (_format_spread(cell, name) for name in ("motion", "action"))
        few = "" if cell["trusted"] else "  too few"
        lines.append(f"{cell['label']:26}{cell['count']:8}  {motion:>20}  {action:>20}{few}")
    if phrases:
        shown = phrases[:_MAX_PHRASES]
        lines.append(f"\n{'phrase':46}{'steps':>7}  mean commanded action")
        for row in shown:
            numbers = " ".join(f"{number:+.4f}" for number in row["action_mean"])
            lines.append(f"{row['phrase']:46}{row['count']:7}  {numbers}{'' if row['trusted'] else '  too few'}")
        if len(phrases) > len(shown):
            lines.append(f"and {len(phrases) - len(shown)} rarer phrases")
    return "\n".join(lines)


def _format_spread(cell: Mapping[str, Any], name: str) -> str:
    mean = cell[f"{name}_mean"]
    return "not recorded" if mean is None else f"{mean:+.4f} ± {cell[f'{name}_spread']:.4f}"
