"""Commands about recorded data: label, calibrate."""

import argparse
import sys
from pathlib import Path

from vlm_local.cli.options import add_data_options, add_embodiment_option, describe_data, read_data_options
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
    from vlm_local.data import open_data_set
    from vlm_local.data.labels import iterate_labels
    from vlm_local.errors import DataError
    from vlm_local.files import encode_json, open_replacing

    problems = ProblemPrinter()
    data = open_data_set(args.data, read_data_options(args), problems)
    episodes, num_steps = set(), 0
    with open_replacing(Path(args.out)) as file:
        for row in iterate_labels(data.episodes, problems):
            file.write(encode_json(row) + "\n")
            episodes.add(row["episode"])
            num_steps += 1
        if not num_steps:
            raise DataError(f"{args.data}: no step could be labelled")
    print(f"{num_steps} steps of {len(episodes)} episodes labelled, {problems.count} problem(s): {args.out}")
    print(f"read: {describe_data(data.about)}")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vlm_local.data import open_data_set
    from vlm_local.errors import DataError
    from vlm_local.files import write_json
    from vlm_local.lab.offline import calibrate

    data = open_data_set(args.data, read_data_options(args), ProblemPrinter())
    calibration = calibrate.collect(data.episodes)
    cells, phrases = list(calibrate.list_cells(calibration)), calibrate.list_phrase_actions(calibration)
    print(f"read: {describe_data(data.about)}")
    print(f"{calibration.num_steps} steps with a full window; metres and radians a control step\n")
    print(calibrate.format_calibration(cells, phrases))
    tilts = calibration.tilts
    print(f"\ntilt came from roll {tilts['roll']} times, from pitch {tilts['pitch']} times\n")
    table, counts = calibrate.build_table(calibration)
    sizes = {"xyz_m": table.x_m, "tilt_rad": table.tilt_rad, "yaw_rad": table.yaw_rad}
    for name, count in counts.items():
        why = (
            "measured" if count >= calibrate.MIN_COUNT else f"the default: {calibrate.MIN_COUNT} steps would be needed"
        )
        print(f"{name:10}{sizes[name]:8.5f}  {count} moving steps, {why}")
    lost = calibrate.find_lost_phrases(table)
    if lost:
        raise DataError(
            f"{len(lost)} phrases would not come back with these sizes, first {lost[0]!r}; nothing is written"
        )
    print("every labelable phrase comes back when carried out with these sizes and labelled, in float32 and float64")
    write_json(args.out, asdict(table))
    statistics = args.out.with_name(args.out.stem + ".statistics.json")
    write_json(statistics, {"steps": calibration.num_steps, "tilts": tilts, "labels": cells, "phrases": phrases})
    print(f"step table: {args.out}, statistics: {statistics}")
    return 0


class ProblemPrinter:
    """Given every record that cannot be used: prints it and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, error: Exception) -> None:
        self.count += 1
        print(escape_controls(f"left out: {error}"), file=sys.stderr)
