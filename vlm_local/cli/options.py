"""Flags that several commands share: which policy answers, what is read of a data set; and numbers as flags."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

MAX_COUNT = 1_000_000
MAX_SEED = 2**32 - 1  # numpy's older generator, which torch and transformers seed too, takes no larger one
MAX_HISTORY = 1000  # phrases: more than an episode has steps
MAX_CONTRAST = 10.0
MAX_DEADLINE_MS = 86_400_000.0  # a day
_SHOWN = 20  # characters of a wrong value


def count(low: int = 1, high: int = MAX_COUNT) -> Callable[[str], int]:
    """For `type=` of a flag: a whole number from low to high, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text[:_SHOWN]!r}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """For `type=` of a flag: a number from low to high, both included; NaN is none."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, not {text[:_SHOWN]!r}")
        return value

    return parse


workers = count(1, 256)  # more processes or threads are a slip of the finger, which would take the machine down
seed = count(0, MAX_SEED)
port = count(0, 2**16 - 1)  # 0 is any that is free


def add_episode_option(parser: argparse.ArgumentParser) -> None:
    text = "only this one, as `runs` names it; may be given again [all]"
    parser.add_argument("--episode", action="append", default=[], metavar="NAME", help=text)


def add_asked_options(parser: argparse.ArgumentParser, out_text: str) -> None:
    """What a command asks of recorded steps, and where its result goes."""
    parser.add_argument("--data", required=True, help="RLDS or LeRobot folder, recorded run, or AutoEval pickles")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=out_text)
    parser.add_argument("--camera", metavar="NAME", help="the images to show [the data set's main camera]")
    add_data_options(parser)
    parser.add_argument("--every", type=count(), default=1, metavar="N", help="ask every Nth step [1]")
    parser.add_argument("--limit", type=count(), metavar="N", help="only the first N episodes [all]")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", metavar="NAME", help='of an RLDS or LeRobot data set, e.g. "train" [all of them]')
    parser.add_argument(
        "--state-layout",
        metavar="NAME",
        help="of an RLDS or LeRobot data set, overrides the embodiment's; see docs/evaluation.md",
    )


def add_embodiment_option(parser: argparse._ActionsContainer) -> None:
    text = "the robot: frame, gripper, limits, camera, see docs/autoeval.md [the checkpoint's, else auto]"
    parser.add_argument("--embodiment", metavar="auto|NAME|FILE", help=text)


def read_data_options(args: argparse.Namespace):
    """Parsed flags -> Selection."""
    from vlm_local.data import Selection

    return Selection(getattr(args, "camera", None), args.split, args.state_layout, args.embodiment or "auto")


def add_model_options(parser: argparse.ArgumentParser, model_flag: str, others: str = "") -> argparse._ArgumentGroup:
    """Which model, and how it is loaded: all that a question about a picture depends on.

    others: what `model_flag` takes beside models, for its help. Returns the group, for more of its kind.
    """
    group = parser.add_argument_group("policy", "defaults: the checkpoint's vlm_local.json, else the value named here")
    add = group.add_argument
    text = f"a name (see `models`), folder or repository{others} [tiny]"
    add(model_flag, dest="model", metavar="NAME", help=text)
    add("--engine", choices=("local", "openai"), default="local", help="where the model runs [local]")
    add("--engine-url", metavar="URL[,URL]", help="base URLs of OpenAI-compatible servers, for --engine openai")
    add("--quantize", choices=("none", "8bit", "4bit"), help="bitsandbytes [none]")
    add("--device", metavar="auto|cpu|cuda:N", help="[auto: the first GPU]")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="[auto]")
    add("--decoder", choices=("trie", "outlines"), help="outlines is the slow reference [trie]")
    add("--offline", action="store_true", help="download nothing")
    text = "longest time for an answer [serve: 60000, else none]"
    add("--deadline-ms", type=number(1, MAX_DEADLINE_MS), metavar="MS", help=text)
    return group


def add_policy_options(parser: argparse.ArgumentParser, model_flag: str = "--model") -> None:
    """All that a robot's policy depends on. model_flag: "--policy" where an URL or a baseline is as good as a model."""
    group = add_model_options(parser, model_flag, '; "random", "stop" or a phrase; a server\'s URL')
    add = group.add_argument
    text = "a JSON file of options of this list, as `tune` writes it; flags override it"
    add("--settings", metavar="FILE", help=text)
    add("--grammar", metavar="NAME|FILE", help="what may be said [primitives]")
    add("--decide", choices=("greedy", "map", "sample"), help="the phrase that is taken [greedy]")
    add("--temperature", type=number(1e-3, 1e3), metavar="T", help="of --decide sample [1]")
    add("--posterior", choices=("off", "fast", "exact"), help="probabilities of the other phrases [fast]")
    add("--prompt", metavar="NAME|FILE", help="[chat, or the family's own]")
    text = "arrows or a ring drawn where the gripper is measured, see docs/zeroshot.md [nothing]"
    add("--marks", choices=("axes", "gripper"), help=text)
    text = "how much of what the model says to a blank picture is taken out, see docs/zeroshot.md [0: nothing]"
    add("--contrast", type=number(0, MAX_CONTRAST), metavar="ALPHA", help=text)
    add("--history", type=count(0, MAX_HISTORY), metavar="N", help="last phrases that the prompt shows [0]")
    text = "N recorded steps in the prompt, with their phrases, balanced over these [none; N: 8]"
    add("--examples", metavar="DATA[:N]", help=text)
    text = "the same in all episodes, or of episodes with such an instruction and first frame [fixed]"
    add("--example-choice", choices=("fixed", "nearest"), help=text)
    add("--frames", type=count(0, 32), metavar="N", help="past frames of the episode in the prompt [0]")
    add("--frame-every", type=count(), metavar="K", help="control steps from one frame to the next [1]")
    text = "of these frames the first, the last, or every other of the last [last]"
    add("--frame-choice", choices=("first", "last", "alternate"), help=text)
    text = "fields that the model writes before it moves, see docs/zeroshot.md; ecot is shipped [nothing]"
    add("--think", metavar="NAME|FILE", help=text)
    add("--think-every", type=count(), metavar="N", help="control steps from one thought to the next [5]")
    add("--think-tokens", type=count(1, 512), metavar="M", help="most tokens of a thought [200]")
    add("--steps-per-phrase", type=count(), metavar="N", help="control steps for which each phrase is repeated [1]")
    add("--max-batch", type=count(1, 1024), metavar="N", help="requests that share a forward [8]")
    add_embodiment_option(group)
    add("--steps", metavar="FILE", help="a step table's JSON, overrides the embodiment's [0.0125 m, 0.125 rad]")


def fill_from_settings(args: argparse.Namespace) -> None:
    """Flags that were not given come from the file of --settings. Raises ConfigError."""
    if getattr(args, "settings", None) is None:
        return
    from vlm_local.policy_options import read_settings

    for name, value in read_settings(Path(args.settings)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def read_policy_options(args: argparse.Namespace):
    """Parsed flags -> PolicyOptions; a command need not have all of them."""
    from dataclasses import fields

    from vlm_local.policy_options import PolicyOptions

    given = vars(args)
    return PolicyOptions(**{field.name: given[field.name] for field in fields(PolicyOptions) if field.name in given})
