"""Commands about recorded data: label, calibrate."""

import argparse
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

from vlm_local.cli.options import add_data_options, add_embodiment_option, read_data_options
from vlm_local.cli.output import ProblemPrinter, describe_data, print_result
from vlm_local.errors import ConfigError, DataError

_DATA = "RLDS or LeRobot folder, lerobot:ORG/NAME on the hub, recorded run, or AutoEval pickles"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("label", help="ground-truth phrases of recorded steps")
    parser.add_argument("data", metavar="DATA", help=_DATA)
    parser.add_argument("--out", metavar="F.jsonl", help="a row a step: episode, step, phrase, full_window")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="a copy of a LeRobot v3 data set, the phrases in its language column"
    )
    add_data_options(parser)
    add_embodiment_option(parser)
    parser.set_defaults(run=_label)

    parser = subparsers.add_parser("calibrate", help="step sizes from recorded data")
    parser.add_argument("--data", required=True, help=_DATA)
    parser.add_argument("--out", required=True, type=Path, metavar="F.json", help="gets the step table for --steps")
    add_data_options(parser)
    add_embodiment_option(parser)
    parser.set_defaults(run=_calibrate)


def _label(args: argparse.Namespace) -> None:
    from vlm_local.data import count_episodes, open_data_set
    from vlm_local.data.lerobot_language import check_target, write_motions
    from vlm_local.files import encode_json, open_replacing
    from vlm_local.primitives import iterate_labels
    from vlm_local.progress import open_bar

    if not (args.out or args.write):
        raise ConfigError("label writes to --out F.jsonl, --write DIR or both; name one")
    if args.write:
        check_target(args.data, args.write)
    problems = ProblemPrinter()
    data = open_data_set(args.data, read_data_options(args), problems)
    phrases: defaultdict[int, list[str]] = defaultdict(list)
    target = open_replacing(Path(args.out)) if args.out else nullcontext()
    with target as file, open_bar("label", count_episodes(args.data, args.split), "episode") as bar:
        for row in iterate_labels(data.episodes, problems):
            if file:
                file.write(encode_json(row) + "\n")
            bar.update(row["episode"] not in phrases)
            phrases[row["episode"]].append(row["phrase"])
        if not phrases:
            raise DataError(f"{args.data}: no step could be labelled")
    result = {"steps": sum(map(len, phrases.values())), "episodes": len(phrases), "problems": problems.count}
    table = "{steps} steps of {episodes} episodes labelled, {problems} problem(s)".format(**result)
    lines = [table + (f": {args.out}" if args.out else ""), f"read: {describe_data(data.about)}"]
    if args.write:
        result["motions"] = write_motions(args.data, args.write, args.split, phrases)
        lines.append(f"{result['motions']} rows of style motion: {args.write}")
    print_result(
        args, "\n".join(lines), result | {"data": data.about, "out": args.out, "write": args.write and str(args.write)}
    )


def _calibrate(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from vlm_local.data import count_episodes, open_data_set
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


def _describe_size(name: str, size: float, num_moving: int, num_needed: int) -> str:
    why = "measured" if num_moving >= num_needed else f"the default: {num_needed} steps would be needed"
    return f"{name:10}{size:8.5f}  {num_moving} moving steps, {why}"
