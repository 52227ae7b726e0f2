"""`spatial`: does a policy look where the words point? Paired scenes with known answers."""

import argparse
from contextlib import closing
from pathlib import Path

from vlm_local.cli.options import add_policy_options, count, read_policy_options, seed
from vlm_local.cli.output import print_result
from vlm_local.errors import ConfigError

_SCENES = 40


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("spatial", help="whether answers follow what matters in a scene, and nothing else")
    parser.description = (
        "Draws scenes in the simulator, each also mirrored, moved, recoloured, reworded, blank ..., and scores by the "
        "policy's probabilities whether its answer turns where the right one turns, stays where it stays, and is no "
        "longer sure where none is right."
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="gets rows.jsonl, report.json, report.html, set.json")
    add("--set", type=Path, metavar="FILE", help="a frozen set: docs/spatial/easy.json, normal.json, hard.json")
    add("--level", help="of a set of your own: easy, normal, hard [normal]")
    add("--seed", type=seed, metavar="S", help="of a set of your own [0]")
    add("--scenes", type=count(2, 100_000), metavar="N", help=f"of a set of your own [{_SCENES}]")
    add_policy_options(parser, "--policy")
    parser.set_defaults(run=_run, goes_on="the same command goes on from here")


def _run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from vlm_local.assembly import is_url
    from vlm_local.lab.formats import format_fixed, format_range
    from vlm_local.lab.sources import name_policy, open_source
    from vlm_local.lab.spatial.faithfulness import CASES, tell_cases
    from vlm_local.lab.spatial.run import run_study
    from vlm_local.lab.spatial.scenes import CHANGES
    from vlm_local.progress import open_bar

    scene_set = _choose_set(args)
    options = read_policy_options(args)
    if not is_url(options.model):
        options = replace(options, steps_per_phrase=1)  # every view is an episode of one step
    with closing(open_source(options)) as source:
        policy = source.build("spatial", tell_all=True)
        reasons = "think" in policy.metadata and not is_url(options.model)  # a server thinks when it likes
        num_views = scene_set.scenes * (len(CHANGES) + 1 + len(CASES) * reasons)
        with open_bar("spatial", num_views, "view") as bar:
            report = run_study(name_policy(options), policy, scene_set, args.out, bar.update, reasons)
    scores = {name: report[name] for name in ("turned", "moved", "left", "right")}
    lines = [
        f"{name:8}{format_fixed(score['value']):>6}  {format_range(score['interval'])}"
        for name, score in scores.items()
    ]
    numbers: dict = {name: {"value": score["value"], "interval": score["interval"]} for name, score in scores.items()}
    if "reasoning" in report:
        lines += tell_cases(report["reasoning"])
        numbers["reasoning"] = report["reasoning"]
    lines += ["turned and right should be 1, moved and left 0", f"report: {args.out / 'report.html'}"]
    print_result(args, "\n".join(lines), {**numbers, "scenes": report["scenes"], "out": str(args.out)})


def _choose_set(args: argparse.Namespace):
    from vlm_local.lab.spatial.sets import SceneSet, load_set

    own = {"level": args.level, "seed": args.seed, "scenes": args.scenes}
    if args.set is None:
        return SceneSet(args.level or "normal", args.seed or 0, _SCENES if args.scenes is None else args.scenes)
    given = [f"--{name}" for name, value in own.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} cannot be chosen with --set, which names them")
    return load_set(args.set)
