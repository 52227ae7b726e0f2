"""`bench`: what the pieces cost on this machine. The last line printed is one JSON object."""

import argparse
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from vlm_local.cli.options import add_policy_options, count, number, read_policy_options

_MAX_ROBOTS = 512


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="measure the parts on this machine")
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_act(kinds)
    _add_decode(kinds)
    _add_profile(kinds)
    _add_rows(kinds)
    _add_examples(kinds)
    _add_think(kinds)
    _add_limit(kinds)
    _add_load(kinds)
    _add_mixed(kinds)
    _add_data(kinds)
    _add_report(kinds)


def _print_last_line(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The same command, of which --quiet leaves the last line: the JSON object."""

    def run_as_asked(args: argparse.Namespace) -> int:
        if not args.quiet:
            return run(args)
        with redirect_stdout(io.StringIO()) as said:
            status = run(args)
        print(said.getvalue().rstrip("\n").rpartition("\n")[2])
        return status

    return run_as_asked


def _add_act(kinds: argparse._SubParsersAction) -> None:
    text = "what the server adds to the engine, and how many robots it answers"
    parser = kinds.add_parser("act", help=text)
    add_policy_options(parser)
    parser.add_argument("--sequences", type=Path, metavar="PATH", help="run or data set whose steps are sent [noise]")
    parser.add_argument("--requests", type=count(), default=200, metavar="N", help="of one robot alone [200]")
    parser.add_argument("--clients", type=_robots, default=[1, 4, 8], metavar="N,...", help="robots at once [1,4,8]")
    parser.add_argument("--seconds", type=number(0.1, 3600), default=4.0, help="of a round of robots at once [4]")
    parser.add_argument("--rounds", type=count(1, 1000), default=3, help="[3]")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--beside", metavar="NAME", help="time this local model in the same run instead")
    instead.add_argument("--doors", action="store_true", help="time the websocket door beside HTTP instead")
    parser.set_defaults(run=_print_last_line(_run_act))


def _run_act(args: argparse.Namespace) -> int:
    if args.beside:
        from vlm_local.bench.beside import run as run_beside

        return run_beside(read_policy_options(args), args.beside, args.requests)
    if args.doors:
        from vlm_local.bench.beside import run_doors

        return run_doors(read_policy_options(args), args.requests)
    from vlm_local.bench.act import run

    return run(read_policy_options(args), args.sequences, args.requests, args.clients, args.seconds, args.rounds)


def _robots(text: str) -> list[int]:
    """ "1,4,8" -> numbers of robots at once."""
    return [count(1, _MAX_ROBOTS)(part) for part in text.split(",")]


def _add_decode(kinds: argparse._SubParsersAction) -> None:
    text = "what an answer costs, in prefills, with each way of decoding"
    parser = kinds.add_parser("decode", help=text)
    _add_subject(parser)
    parser.add_argument("--sequences", type=Path, metavar="PATH", help="run, data set or labels to play [made-up]")
    parser.add_argument("--rounds", type=count(), default=40, metavar="N", help="steps that are timed [40]")
    parser.set_defaults(run=_print_last_line(_run_decode))


def _add_subject(parser: argparse.ArgumentParser) -> None:
    add_policy_options(parser)
    text = "random weights of a real shape instead: qwen2-vl-2b, qwen2-vl-7b or small"
    parser.add_argument("--shape", metavar="NAME", help=text)
    parser.add_argument("--layers", type=count(1, 1000), metavar="N", help="with --shape: only so many [all]")


def _run_decode(args: argparse.Namespace) -> int:
    from vlm_local.bench.decode import run

    return run(read_policy_options(args), args.shape, args.layers, args.sequences, args.rounds)


def _add_profile(kinds: argparse._SubParsersAction) -> None:
    text = "where the time of a step goes: its parts, kernels, copies and waits"
    parser = kinds.add_parser("profile", help=text)
    _add_subject(parser)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="steps that are timed [20]")
    parser.set_defaults(run=_print_last_line(_run_profile))


def _run_profile(args: argparse.Namespace) -> int:
    from vlm_local.bench.profile import run

    return run(read_policy_options(args), args.shape, args.layers, args.rounds)


def _add_rows(kinds: argparse._SubParsersAction) -> None:
    text = "how long a step takes for several robots at once"
    parser = kinds.add_parser("rows", help=text)
    _add_subject(parser)
    text = "robots at once [1,4,8,16]"
    parser.add_argument("--counts", type=_robots, default=[1, 4, 8, 16], metavar="N,...", help=text)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="[20]")
    parser.set_defaults(run=_print_last_line(_run_rows))


def _run_rows(args: argparse.Namespace) -> int:
    from vlm_local.bench.rows import run

    return run(read_policy_options(args), args.shape, args.layers, args.counts, args.rounds)


def _add_examples(kinds: argparse._SubParsersAction) -> None:
    text = "what a step costs with examples in the prompt"
    parser = kinds.add_parser("examples", help=text)
    _add_subject(parser)
    text = "numbers of examples [0,8]"
    parser.add_argument("--counts", type=_examples, default=[0, 8], metavar="N,...", help=text)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="[20]")
    parser.set_defaults(run=_print_last_line(_run_examples))


def _examples(text: str) -> list[int]:
    """ "0,8" -> numbers of examples."""
    return [count(0, 64)(part) for part in text.split(",")]


def _run_examples(args: argparse.Namespace) -> int:
    from vlm_local.bench.examples import run

    return run(read_policy_options(args), args.shape, args.layers, args.counts, args.rounds)


def _add_think(kinds: argparse._SubParsersAction) -> None:
    text = "how long a step takes while thoughts are written between steps, beside steps without"
    parser = kinds.add_parser("think", help=text)
    add_policy_options(parser)
    parser.add_argument("--hz", type=number(0.01, 1000), default=5.0, help="steps a second of the robot [5]")
    parser.add_argument("--rounds", type=count(), default=10, metavar="N", help="episodes of each kind, in turns [10]")
    parser.add_argument("--episode-steps", type=count(), default=30, metavar="N", help="[30]")
    parser.set_defaults(run=_print_last_line(_run_think))


def _run_think(args: argparse.Namespace) -> int:
    from vlm_local.bench.think import run

    return run(read_policy_options(args), args.hz, args.rounds, args.episode_steps)


def _add_limit(kinds: argparse._SubParsersAction) -> None:
    text = "what the device could do at best, and how much of it the language model reaches"
    parser = kinds.add_parser("limit", help=text)
    _add_subject(parser)
    parser.set_defaults(run=_print_last_line(_run_limit))


def _run_limit(args: argparse.Namespace) -> int:
    from vlm_local.bench.limit import run

    return run(read_policy_options(args), args.shape, args.layers)


def _add_load(kinds: argparse._SubParsersAction) -> None:
    text = "a soak: rough robots, a failing engine, a model whose process is killed; exit status 1 where it fails"
    parser = kinds.add_parser("load", help=text)
    add_policy_options(parser)
    parser.add_argument("--robots", type=count(1, _MAX_ROBOTS), default=8, metavar="N", help="[8]")
    parser.add_argument("--minutes", type=number(0.01, 1e6), default=30.0, metavar="M", help="[30]")
    parser.add_argument("--hz", type=number(0.01, 1000), default=5.0, help="requests a second of each robot [5]")
    text = "share of engine calls [0.005]"
    parser.add_argument("--fault-rate", type=number(0, 1), default=0.005, metavar="P", help=text)
    text = "mean time between two kill -9 of the model's process, 0 for none [60]"
    parser.add_argument("--kill-every", type=number(0, 1e6), default=60.0, metavar="S", help=text)
    text = "the model's process is the server's own, as with `serve`, not an OpenAI-compatible one"
    parser.add_argument("--no-sidecar", action="store_true", help=text)
    parser.set_defaults(run=_print_last_line(_run_load))


def _run_load(args: argparse.Namespace) -> int:
    from vlm_local.bench.load import SoakSettings, run

    settings = SoakSettings(
        args.robots, args.minutes, args.hz, args.fault_rate, args.kill_every or None, not args.no_sidecar
    )
    return run(read_policy_options(args), settings)


def _add_mixed(kinds: argparse._SubParsersAction) -> None:
    text = "robots alone and beside slow sockets, rubbish, large bodies, questions, pages; exit status 1 where it fails"
    parser = kinds.add_parser("mixed", help=text)
    add_policy_options(parser)
    parser.add_argument("--robots", type=count(1, _MAX_ROBOTS), default=6, metavar="N", help="[6]")
    parser.add_argument(
        "--seconds",
        type=number(1, 1e5),
        default=60.0,
        help="of robots alone, beside strangers, and while those ask another server [60]",
    )
    parser.add_argument("--rounds", type=count(1, 1000), default=4, help="in which these take turns [4]")
    parser.add_argument("--hz", type=number(0.01, 1000), default=2.0, help="requests a second of each robot [2]")
    parser.set_defaults(run=_print_last_line(_run_mixed))


def _run_mixed(args: argparse.Namespace) -> int:
    from vlm_local.bench.mixed import MixedSettings, run

    return run(read_policy_options(args), MixedSettings(args.robots, args.seconds, args.rounds, args.hz))


def _add_data(kinds: argparse._SubParsersAction) -> None:
    text = "how fast recorded steps are read and labelled, and answers scored"
    parser = kinds.add_parser("data", help=text)
    parser.add_argument("--data", metavar="PATH", help="a data set to read [a run written for the purpose]")
    parser.add_argument("--rounds", type=count(1, 1000), default=5, help="[5]")
    parser.set_defaults(run=_print_last_line(_run_data))


def _run_data(args: argparse.Namespace) -> int:
    from vlm_local.bench.data import run

    return run(args.data, args.rounds)


def _add_report(kinds: argparse._SubParsersAction) -> None:
    text = "write FOLDER.md from the results saved in FOLDER, one .json each"
    parser = kinds.add_parser("report", help=text)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/benchmarks"), help="[docs/benchmarks]")
    parser.set_defaults(run=_print_last_line(_run_report))


def _run_report(args: argparse.Namespace) -> int:
    from vlm_local.bench.report import write_report

    print(write_report(args.folder))
    return 0
