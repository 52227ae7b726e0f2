"""Commands about recorded runs: runs, export."""

import argparse
from datetime import datetime
from pathlib import Path

from vlm_local.cli.options import add_episode_option
from vlm_local.cli.output import ProblemPrinter, print_result
from vlm_local.errors import DataError
from vlm_local.plain import escape_controls

DEFAULT_FOLDER = "runs"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("runs", help="list recorded episodes")
    parser.add_argument(
        "folder", nargs="?", default=DEFAULT_FOLDER, metavar="DIR", help="a run, or a folder of runs (default: runs)"
    )
    parser.set_defaults(run=_list)

    parser = subparsers.add_parser("export", help="a recorded run as a LeRobot data set and films")
    parser.add_argument("folder", metavar="RUN", help="a run folder, e.g. runs/20260101-120000-qwen2-vl")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets lerobot/ and an MP4 an episode in films/")
    add_episode_option(parser)
    parser.set_defaults(run=_export)


def _list(args: argparse.Namespace) -> None:
    from vlm_local.data.summary import list_runs, read_meta, summarise_run

    runs = list_runs(args.folder)
    if not runs:
        raise DataError(f"no recorded run in {args.folder}; `serve` records into {DEFAULT_FOLDER}/")
    for run in runs:
        episodes = list(summarise_run(run))
        print(f"{run}  model {read_meta(run).get('model', 'unknown')}, {len(episodes)} episodes")
        for episode in episodes:
            print(_describe(episode))


def _describe(episode) -> str:
    """One line of a data.summary.EpisodeSummary."""
    started = datetime.fromtimestamp(episode.started).strftime("%H:%M:%S") if episode.started else "-"
    faults = f"({episode.num_faults} faults)" if episode.num_faults else ""
    numbers = f"{episode.num_steps:5} steps {episode.duration_s:6.0f} s"
    words = [escape_controls(episode.instruction), faults, episode.problem or ""]
    return f"  {episode.id:24} {started:8} {numbers}  {' '.join(word for word in words if word)}"


def _export(args: argparse.Namespace) -> None:
    from vlm_local.data import count_episodes
    from vlm_local.data.film import write_film
    from vlm_local.data.lerobot_export import export_lerobot
    from vlm_local.data.runs import read_run
    from vlm_local.data.summary import list_runs
    from vlm_local.progress import track

    if list_runs(args.folder) != [Path(args.folder)]:
        raise DataError(f"{args.folder} is no recorded run; `runs` lists those in {DEFAULT_FOLDER}/")
    problems, out = ProblemPrinter(), Path(args.out)
    total = len(args.episode) or count_episodes(args.folder)
    episodes = track(read_run(args.folder, problems, args.episode), "lerobot", "episode", total)
    num_episodes, num_frames = export_lerobot(episodes, out / "lerobot", problems)
    films = out / "films"
    films.mkdir(parents=True, exist_ok=True)
    num_films = 0
    readable = read_run(args.folder, lambda error: None, args.episode)  # the others are reported above
    for episode in track(readable, "films", "film", num_episodes):
        try:
            steps = ((episode.load_image(step), line) for step, line in enumerate(episode.lines))
            num_films += write_film(films / f"{Path(episode.source).name}.mp4", steps) > 0
        except DataError as error:
            problems(error)
    table = f"{num_episodes} episodes ({num_frames} frames) in {out / 'lerobot'}, {num_films} films in {films}"
    result = {"episodes": num_episodes, "frames": num_frames, "films": num_films, "problems": problems.count}
    print_result(args, table, result | {"out": args.out})
