"""`bench`: what the pieces cost on this machine. The last line printed is one JSON object."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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


def _add(kinds: argparse._SubParsersAction, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text)
    parser.set_defaults(run=run)
    return parser


def _print(args: argparse.Namespace, lines: Iterable[str], result: Mapping[str, Any]) -> None:
    """What was measured: `lines` for people unless --quiet, then the JSON object, with the machine in it."""
    from vlm_local.provenance import describe_machine

    for line in () if args.quiet else lines:
        print(line)
    print(json.dumps({**result, **describe_machine()}))


def _numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """For `type=` of a flag: "1,4,8" -> numbers from low to high."""
    parse = count(low, high)
    return lambda text: [parse(part) for part in text.split(",")]


def _add_subject(parser: argparse.ArgumentParser) -> None:
    add_policy_options(parser)
    text = "random weights of a real shape instead: qwen2-vl-2b, qwen2-vl-7b, qwen3.5-4b or small"
    parser.add_argument("--shape", metavar="NAME", help=text)
    parser.add_argument("--layers", type=count(1, 1000), metavar="N", help="with --shape: only so many [all]")


def _load_subject(args: argparse.Namespace):
    from vlm_local.bench.subject import load_subject

    return load_subject(read_policy_options(args), args.shape, args.layers)


def _add_act(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "act", _run_act, "what the server adds to the engine, and how many robots it answers")
    add_policy_options(parser)
    parser.add_argument("--sequences", type=Path, metavar="PATH", help="run or data set whose steps are sent [noise]")
    parser.add_argument("--requests", type=count(), default=200, metavar="N", help="of one robot alone [200]")
    text = "robots at once [1,4,8]"
    parser.add_argument("--clients", type=_numbers(1, _MAX_ROBOTS), default=[1, 4, 8], metavar="N,...", help=text)
    parser.add_argument("--seconds", type=number(0.1, 3600), default=4.0, help="of a round of robots at once [4]")
    parser.add_argument("--rounds", type=count(1, 1000), default=3, help="[3]")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--beside", metavar="NAME", help="time this local model in the same run instead")
    instead.add_argument("--doors", action="store_true", help="time the websocket door beside HTTP instead")


def _run_act(args: argparse.Namespace) -> None:
    from vlm_local.bench import act, beside

    options = read_policy_options(args)
    if args.beside:
        told = beside.compare_servers(options, args.beside, args.requests)
    elif args.doors:
        told = beside.compare_doors(options, args.requests)
    else:
        told = act.measure(options, args.sequences, args.requests, args.clients, args.seconds, args.rounds)
    _print(args, *told)


def _add_decode(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "decode", _run_decode, "what an answer costs, in prefills, with each way of decoding")
    _add_subject(parser)
    parser.add_argument("--sequences", type=Path, metavar="PATH", help="run, data set or labels to play [made-up]")
    parser.add_argument("--rounds", type=count(), default=40, metavar="N", help="steps that are timed [40]")


def _run_decode(args: argparse.Namespace) -> None:
    from vlm_local.bench.decode import measure

    _print(args, *measure(read_policy_options(args), args.shape, args.layers, args.sequences, args.rounds))


def _add_profile(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "profile", _run_profile, "where the time of a step goes: its parts, kernels, copies and waits")
    _add_subject(parser)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="steps that are timed [20]")


def _run_profile(args: argparse.Namespace) -> None:
    from vlm_local.bench.profile import measure

    _print(args, *measure(_load_subject(args), args.rounds))


def _add_rows(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "rows", _run_rows, "how long a step takes for several robots at once")
    _add_subject(parser)
    text = "robots at once [1,4,8,16]"
    parser.add_argument("--counts", type=_numbers(1, _MAX_ROBOTS), default=[1, 4, 8, 16], metavar="N,...", help=text)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="[20]")


def _run_rows(args: argparse.Namespace) -> None:
    from vlm_local.bench.rows import measure

    _print(args, *measure(_load_subject(args), args.counts, args.rounds))


def _add_examples(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "examples", _run_examples, "what a step costs with examples in the prompt")
    _add_subject(parser)
    text = "numbers of examples [0,8]"
    parser.add_argument("--counts", type=_numbers(0, 64), default=[0, 8], metavar="N,...", help=text)
    parser.add_argument("--rounds", type=count(), default=20, metavar="N", help="[20]")


def _run_examples(args: argparse.Namespace) -> None:
    from vlm_local.bench.examples import measure

    _print(args, *measure(_load_subject(args), args.counts, args.rounds, is_prepared=args.shape is not None))


def _add_think(kinds: argparse._SubParsersAction) -> None:
    text = "how long a step takes while thoughts are written between steps, beside steps without"
    parser = _add(kinds, "think", _run_think, text)
    add_policy_options(parser)
    parser.add_argument("--hz", type=number(0.01, 1000), default=5.0, help="steps a second of the robot [5]")
    parser.add_argument("--rounds", type=count(), default=10, metavar="N", help="episodes of each kind, in turns [10]")
    parser.add_argument("--episode-steps", type=count(), default=30, metavar="N", help="[30]")


def _run_think(args: argparse.Namespace) -> None:
    from vlm_local.bench.think import measure

    _print(args, *measure(read_policy_options(args), args.hz, args.rounds, args.episode_steps))


def _add_limit(kinds: argparse._SubParsersAction) -> None:
    text = "what the device could do at best, and how much of it the language model reaches"
    parser = _add(kinds, "limit", _run_limit, text)
    _add_subject(parser)


def _run_limit(args: argparse.Namespace) -> None:
    from vlm_local.bench.limit import measure

    _print(args, *measure(_load_subject(args)))


def _add_load(kinds: argparse._SubParsersAction) -> None:
    text = "a soak: rough robots, a failing engine, a model whose process is killed; exit status 1 where it fails"
    parser = _add(kinds, "load", _run_load, text)
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


def _run_load(args: argparse.Namespace) -> int:
    import signal
    import sys

    from vlm_local.bench.load import SoakSettings, soak

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the soak's own processes end, too
    settings = SoakSettings(
        args.robots, args.minutes, args.hz, args.fault_rate, args.kill_every or None, not args.no_sidecar
    )
    return _print_judged(args, soak(read_policy_options(args), settings))


def _add_mixed(kinds: argparse._SubParsersAction) -> None:
    text = "robots alone and beside slow sockets, rubbish, large bodies, questions, pages; exit status 1 where it fails"
    parser = _add(kinds, "mixed", _run_mixed, text)
    add_policy_options(parser)
    parser.add_argument("--robots", type=count(1, _MAX_ROBOTS), default=6, metavar="N", help="[6]")
    text = "of robots alone, beside strangers, and while those ask another server [60]"
    parser.add_argument("--seconds", type=number(1, 1e5), default=60.0, help=text)
    parser.add_argument("--rounds", type=count(1, 1000), default=4, help="in which these take turns [4]")
    parser.add_argument("--hz", type=number(0.01, 1000), default=2.0, help="requests a second of each robot [2]")


def _run_mixed(args: argparse.Namespace) -> int:
    from vlm_local.bench.mixed import MixedSettings, measure

    settings = MixedSettings(args.robots, args.seconds, args.rounds, args.hz)
    return _print_judged(args, measure(read_policy_options(args), settings))


def _print_judged(args: argparse.Namespace, result: Mapping[str, Any]) -> int:
    """Exit status 1 where something was violated."""
    _print(args, [f"violation: {what}" for what in result["violations"]], result)
    return 0 if result["passed"] else 1


def _add_data(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "data", _run_data, "how fast recorded steps are read and labelled, and answers scored")
    parser.add_argument("--data", metavar="PATH", help="a data set to read [a run written for the purpose]")
    parser.add_argument("--rounds", type=count(1, 1000), default=5, help="[5]")


def _run_data(args: argparse.Namespace) -> None:
    from vlm_local.bench.data import measure

    _print(args, *measure(args.data, args.rounds))


def _add_report(kinds: argparse._SubParsersAction) -> None:
    parser = _add(kinds, "report", _run_report, "write FOLDER.md from the results saved in FOLDER, one .json each")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/benchmarks"), help="[docs/benchmarks]")


def _run_report(args: argparse.Namespace) -> None:
    from vlm_local.bench.report import write_report

    print(write_report(args.folder))
