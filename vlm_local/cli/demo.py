"""`demo`: everything at once, to look at."""

import argparse

from vlm_local.cli.options import count, port
from vlm_local.cli.output import print_result, tell


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="server, simulated robot and live page in one command")
    parser.description = (
        "Serves the embedded model to this machine alone, lets it drive a simulated WidowX through all tasks, and "
        "opens the live page in a browser. Nothing is recorded."
    )
    text = "of 127.0.0.1; 0 takes any that is free [8000]"
    parser.add_argument("--port", type=port, default=8000, help=text)
    parser.add_argument("--episodes", type=count(), metavar="N", help="end after so many [goes on until Ctrl-C]")
    parser.add_argument("--no-browser", action="store_true", help="open no page; its address is printed anyway")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    import webbrowser

    from vlm_local.lab.closed_loop.demo import open_server, play

    with open_server(args.port) as url:
        print(f"look at {url}/; Ctrl-C ends it", flush=True)
        if not args.no_browser:
            webbrowser.open(f"{url}/")
        num_episodes = num_succeeded = 0
        for episode in play(url, args.episodes):
            num_episodes, num_succeeded = num_episodes + 1, num_succeeded + (episode.outcome == "success")
            tell(args, f"{episode.instruction}: {episode.outcome} after {episode.num_steps} steps")
    table = f"{num_succeeded} of {num_episodes} episodes succeeded"
    print_result(args, table, {"episodes": num_episodes, "succeeded": num_succeeded})
