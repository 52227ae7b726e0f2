"""Recorded episodes for the eye: view, share."""

import argparse
from pathlib import Path

from vlm_local.cli.options import port
from vlm_local.cli.output import print_result
from vlm_local.errors import DataError, refuse

_PORT = 8010


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("view", help="look at recorded episodes in a browser, without a model")
    parser.description = (
        "Serves a page with the episodes of runs, with filters and keys, to this machine only; and the pictures that "
        "AutoEval's detector kept (--save_classifier_data), for a person to label."
    )
    text = "run folders of serve or sim, folders of AutoEval's auto_eval_log, or folders of such"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    text = f"of 127.0.0.1; 0 takes any that is free [{_PORT}]"
    parser.add_argument("--port", type=port, default=_PORT, help=text)
    parser.set_defaults(run=_view)

    parser = subparsers.add_parser("share", help="one episode as one HTML file with its pictures, for a colleague")
    parser.description = "Writes steps, probabilities and pictures of an episode into a file that a browser plays."
    parser.add_argument("episode", type=Path, metavar="EPISODE", help="an episode's folder, e.g. RUN/episodes/reach-3")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="opens from disk, asks no network")
    parser.set_defaults(run=_share)


def _view(args: argparse.Namespace) -> None:
    from vlm_local.data.corrections import list_logs
    from vlm_local.data.summary import list_runs
    from vlm_local.server.serve import bind
    from vlm_local.server.viewer import serve_episodes

    runs = [run for folder in args.runs for run in list_runs(folder)]
    logs = [log for folder in args.runs for log in list_logs(folder)]
    empty = [str(folder) for folder in args.runs if not list_runs(folder) and not list_logs(folder)]
    if empty:
        raise DataError(
            f"no recorded run in {', '.join(empty)}; expected what serve or sim recorded, or AutoEval's N_img.png"
        )
    with bind("127.0.0.1", args.port) as listener:
        what = f"runs: {len(runs)}" + (f", detector logs: {len(logs)}" if logs else "")
        print(f"look at http://127.0.0.1:{listener.getsockname()[1]}/; {what}; Ctrl-C ends it", flush=True)
        serve_episodes(runs, logs, listener)


def _share(args: argparse.Namespace) -> None:
    from vlm_local.data.runs import read_run
    from vlm_local.server.viewer import write_episode

    folder = args.episode.resolve()
    if not (folder / "steps.jsonl").is_file():
        raise DataError(f"{args.episode} is no recorded episode; expected a folder such as RUN/episodes/reach-3")
    (episode,) = read_run(folder.parents[1], refuse, [folder.name])
    num_frames = write_episode(args.out, episode, folder.name)
    size = args.out.stat().st_size
    table = f"{args.out}: {num_frames} pictures, {size / 1e6:.1f} MB"
    print_result(args, table, {"out": str(args.out), "pictures": num_frames, "bytes": size})
