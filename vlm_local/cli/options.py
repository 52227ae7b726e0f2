"""Flags that several commands share: which policy answers, and what is read of a data set."""

import argparse


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="NAME", help='of an RLDS or LeRobot data set, e.g. "train" [all of them]')
    parser.add_argument(
        "--state-layout",
        metavar="NAME",
        help="of an RLDS or LeRobot data set that names no layout of its states; see docs/evaluation.md",
    )


def read_data_options(args: argparse.Namespace):
    """Parsed flags -> Selection."""
    from vlm_local.data import Selection

    return Selection(getattr(args, "camera", None), args.split, args.state_layout)


def describe_data(about) -> str:
    """What is read of a data set, e.g. "RLDS, camera image_0, splits train, val, state layout pose"."""
    splits = f"split{'s' * (len(about['splits']) > 1)} {', '.join(about['splits'])}"
    words = [
        about["format"],
        f"camera {about['camera']}" if about["camera"] else "",
        splits if any(about["splits"]) else "",
        f"state layout {about['state_layout']}",
    ]
    return ", ".join(filter(None, words))


def add_policy_options(parser: argparse.ArgumentParser, model_flag: str = "--model") -> None:
    """model_flag: "--policy" where an URL or a baseline is as good as a model."""
    group = parser.add_argument_group("policy", "defaults: the checkpoint's vlm_local.json, else the value named here")
    add = group.add_argument
    add(
        model_flag,
        dest="model",
        metavar="NAME",
        help='a name (see `models`), folder or repository; "random", "stop" or a phrase; a server\'s URL [tiny]',
    )
    add("--engine", choices=("local", "openai"), default="local", help="where the model runs [local]")
    add("--engine-url", metavar="URL[,URL]", help="base URLs of OpenAI-compatible servers, for --engine openai")
    add("--quantize", choices=("none", "8bit", "4bit"), help="bitsandbytes [none]")
    add("--device", metavar="auto|cpu|cuda:N", help="[auto: the first GPU]")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="[auto]")
    add("--grammar", metavar="NAME|FILE", help="what may be said [primitives]")
    add("--decoder", choices=("trie", "outlines"), help="outlines is the slow reference [trie]")
    add("--decide", choices=("greedy", "map", "sample"), help="the phrase that is taken [greedy]")
    add("--temperature", type=float, metavar="T", help="of --decide sample [1]")
    add("--posterior", choices=("off", "fast", "exact"), help="probabilities of the other phrases [fast]")
    add("--prompt", metavar="NAME|FILE", help="[chat, or the family's own]")
    add("--history", type=int, metavar="N", help="last phrases that the prompt shows [0]")
    add("--steps-per-phrase", type=int, metavar="N", help="control steps that a phrase is held [1]")
    add("--max-batch", type=int, metavar="N", help="requests that share a forward [8]")
    add("--steps", metavar="FILE", help="a step table's JSON [0.0125 m, 0.125 rad]")
    add("--offline", action="store_true", help="download nothing")
    add("--deadline-ms", type=float, metavar="MS", help="longest time for an answer [serve: 60000, else none]")


def read_policy_options(args: argparse.Namespace):
    """Parsed flags -> PolicyOptions."""
    from dataclasses import fields

    from vlm_local.assembly import PolicyOptions

    return PolicyOptions(**{field.name: getattr(args, field.name) for field in fields(PolicyOptions)})
