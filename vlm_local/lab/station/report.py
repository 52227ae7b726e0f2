"""A job's page, and its result for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.lab import pages
from vlm_local.lab.formats import format_share, format_span


def write_job_page(folder: Path, report: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> None:
    """`folder`/report.html. episodes: of each "number", "success", "truth", "seconds", "film" and "last", a picture."""
    success, ms = report["success"], report["answer_ms"]
    rows = [{**each, "last": pages.encode_thumbnail(each["last"])} for each in episodes]
    ended = f"{len(report['would_have_ended'])} events would have ended AutoEval's job; they are listed below."
    told = f"succeeded, {success['count']} of {success['n']}, {format_span(success['interval'])} %"
    judged = "in truth" if report["station"]["detector"] == "truth" else "by the detector"
    pages.write_page(
        folder / "report.html",
        "station/report.html",
        report,
        made=("station",),
        warnings=[ended] * bool(report["would_have_ended"]) + [report["gone"]] * bool(report["gone"]),
        cards=[
            (format_share(success["rate"]), f"{told}, {judged}"),
            (f"{ms['p50']:.0f} ms", f"median answer, 95 % within {ms['p95']:.0f} ms, longest {ms['max']:.0f} ms"),
            (len(report["would_have_ended"]), "events that would have ended the job"),
        ],
        episodes=rows,
    )


def format_report(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    success, reached, ms = report["success"], report["reached"], report["answer_ms"]
    lines = [
        f"success at the end {success['count']} of {success['n']} ({format_span(success['interval'])} %), in truth "
        f"{report['truth']['count']}, at some step {reached['count']}",
        f"answers: median {ms['p50']:.0f} ms, 95 % within {ms['p95']:.0f}, longest {ms['max']:.0f}; "
        f"{report['steps_per_min']:.0f} steps a minute",
        f"steps: {ms['n']}, clipped {report['clipped']}, reversed {report['reversed']}, out of reach "
        f"{report['dropped']}",
    ]
    scene = report["scene_resets"]
    if scene["tries"]:
        lines.append(f"the scene was put back in {scene['tries']} tries, persons called {scene['persons_called']}")
    ended = report["would_have_ended"]
    if report["gone"] is not None:
        lines.append(f"ended after {success['n']} of {report['station']['episodes']} episodes: {report['gone']}")
    lines += [f"AutoEval would have ended the job {len(ended)} times" if ended else "nothing would have ended the job"]
    lines += [f"  episode {each['episode']}, step {each['step']}, {each['exception']}" for each in ended]
    if report.get("second") is not None:
        lines += ["the second station:", *(f"  {line}" for line in format_report(report["second"]).splitlines())]
    return "\n".join(lines)
