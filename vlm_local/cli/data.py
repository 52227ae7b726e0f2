"""Commands about recorded data: label, calibrate."""

import argparse
import sys
from pathlib import Path

from vlm_local.cli.options import add_data_options, add_embodiment_option, describe_data, read_data_options
from vlm_local.cli.output import print_result
from vlm_local.plain import escape_controls


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("label", help="ground-truth phrases of recorded steps")
    parser.add_argument("data", metavar="DATA", help="RLDS or LeRobot folder, recorded run, or AutoEval pickles")
    parser.add_argument(
        "--out", required=True, metavar="F.jsonl", help="a row a step: episode, step, phrase, full_window"
    )
    add_data_options(parser)
    add_embodiment_option(parser)
    parser.set_defaults(run=_label)

    parser = subparsers.add_parser("calibrate", help="step sizes from recorded data")
    parser.add_argument("--data", required=True, help="RLDS or LeRobot folder, recorded run, or AutoEval pickles")
    parser.add_argument("--out", required=True, type=Path, metavar="F.json", help="gets the step table for --steps")
    add_data_options(parser)
    add_embodiment_option(parser)
    parser.set_defaults(run=_calibrate)


def _label(args: argparse.Namespace) -> int:
    from vlm_local.data import count_episodes, open_data_set
    from vlm_local.data.labels import iterate_labels
    from vlm_local.errors import DataError
    from vlm_local.files import encode_json, open_replacing
    from vlm_local.progress import open_bar

    problems = ProblemPrinter()
    data = open_data_set(args.data, read_data_options(args), problems)
    episodes, num_steps, num_episodes = set(), 0, count_episodes(args.data, args.split)
    with open_replacing(Path(args.out)) as file, open_bar("label", num_episodes, "episode") as bar:
        for row in iterate_labels(data.episodes, problems):
            file.write(encode_json(row) + "\n")
            bar.update(row["episode"] not in episodes)
            episodes.add(row["episode"])
            num_steps += 1
        if not num_steps:
            raise DataError(f"{args.data}: no step could be labelled")
    table = f"{num_steps} steps of {len(episodes)} episodes labelled, {problems.count} problem(s): {args.out}"
    result = {"steps": num_steps, "episodes": len(episodes), "problems": problems.count, "data": data.about}
    print_result(args, f"{table}\nread: {describe_data(data.about)}", result | {"out": args.out})
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vlm_local.data import count_episodes, open_data_set
    from vlm_local.errors import DataError
    from vlm_local.files import write_json
    from vlm_local.lab.offline import calibrate
    from vlm_local.progress import track

    data = open_data_set(args.data, read_data_options(args), ProblemPrinter())
    num_episodes = count_episodes(args.data, args.split)
    calibration = calibrate.collect(track(data.episodes, "calibrate", "episode", num_episodes))
    cells, phrases = list(calibrate.list_cells(calibration)), calibrate.list_phrase_actions(calibration)
    table, counts = calibrate.build_table(calibration)
    sizes = {"xyz_m": table.x_m, "tilt_rad": table.tilt_rad, "yaw_rad": table.yaw_rad}
    lines = [
        f"read: {describe_data(data.about)}",
        f"{calibration.num_steps} steps with a full window; metres and radians a control step\n",
        calibrate.format_calibration(cells, phrases),
        f"\ntilt came from roll {calibration.tilts['roll']} times, from pitch {calibration.tilts['pitch']} times\n",
        *(_describe_size(name, sizes[name], count, calibrate.MIN_COUNT) for name, count in counts.items()),
    ]
    lost = calibrate.find_lost_phrases(table)
    if lost:
        raise DataError(
            f"{len(lost)} phrases would not come back with these sizes, first {lost[0]!r}; nothing is written"
        )
    lines.append("every labelable phrase comes back when carried out with these sizes and labelled, in float32 and 64")
    write_json(args.out, asdict(table))
    statistics = args.out.with_name(args.out.stem + ".statistics.json")
    about = {"steps": calibration.num_steps, "tilts": calibration.tilts}
    write_json(statistics, {**about, "labels": cells, "phrases": phrases})
    lines.append(f"step table: {args.out}, statistics: {statistics}")
    print_result(args, "\n".join(lines), {**about, "sizes": sizes, "moving_steps": counts, "out": str(args.out)})
    return 0


def _describe_size(name: str, size: float, num_moving: int, num_needed: int) -> str:
    why = "measured" if num_moving >= num_needed else f"the default: {num_needed} steps would be needed"
    return f"{name:10}{size:8.5f}  {num_moving} moving steps, {why}"


class ProblemPrinter:
    """Given every record that cannot be used: prints it and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, error: Exception) -> None:
        self.count += 1
        print(escape_controls(f"left out: {error}"), file=sys.stderr)
