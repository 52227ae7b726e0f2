"""`train detector`: fine-tune a success detector on labelled pictures, and score it on episodes it has not seen."""

import argparse
from math import ceil
from pathlib import Path

from vlm_local.cli.options import MAX_COUNT, count, number, seed
from vlm_local.cli.output import ProblemPrinter, print_result, tell
from vlm_local.errors import DataError

# AutoEval's own, of scripts/ft_paligemma.py.
_EPOCHS, _RANK, _RATE, _WARMUP = 80, 8, 2e-5, 2
_SAMPLES, _AT_ONCE = 16, 4
_WEIGHT_DECAY, _BETA2 = 1e-6, 0.999
_PRECISION = 0.95  # wanted of answers, as eval-answers' own default
_REPORT = "held-out"


def add_detector(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Labels come from AutoEval's record-*.pkl, positives.pkl and negatives.pkl, the live page's labels.jsonl, or a "
        "folder of pictures for each answer. Defaults are AutoEval's own."
    )
    add = parser.add_argument
    add("--data", required=True, nargs="+", type=Path, metavar="FOLDER", help="the labelled pictures")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the result; a killed run goes on from there")
    add("--model", default="paligemma", metavar="NAME", help="a name (see `models`), folder or repository [paligemma]")
    add("--question", help="what the pictures answer [what the data say]")
    add(
        "--bgr", action="store_true", help="positives.pkl and negatives.pkl are older than 2026-01-29: blue comes first"
    )
    add("--epochs", type=count(1, 10_000), default=_EPOCHS, metavar="N", help=f"[{_EPOCHS}]")
    text = f"train adapters of this rank; 0: all weights [{_RANK}]"
    add("--lora", type=count(0, 4096), default=_RANK, metavar="RANK", help=text)
    add("--learning-rate", type=number(1e-9, 1), default=_RATE, metavar="R", help=f"[{_RATE:g}]")
    text = f"pictures in one forward, of {_SAMPLES} a step: as memory allows [{_AT_ONCE}]"
    add("--at-once", type=count(1, MAX_COUNT), default=_AT_ONCE, metavar="N", help=text)
    add("--bfloat16", action="store_true", help="compute in bfloat16, as AutoEval does; trained weights stay float32")
    add("--device", default="auto", metavar="auto|cpu|cuda:N", help="[auto: the first GPU]")
    add("--offline", action="store_true", help="download nothing")
    add("--seed", type=seed, default=0)
    parser.set_defaults(run=_run, goes_on="the same command goes on from the last saved step")


def _run(args: argparse.Namespace) -> None:
    from vlm_local.models import find_checkpoint
    from vlm_local.prompts import load_template
    from vlm_local.training.finetune import Tuning, finetune
    from vlm_local.training.labelled import LabelledSamples
    from vlm_local.training.optimisation import Recipe

    checkpoint = find_checkpoint(args.model, args.offline)
    is_paligemma = checkpoint.family.startswith("paligemma")
    question, choices, split = _read(args)
    template = load_template("paligemma_answer" if is_paligemma else "answer")
    samples = LabelledSamples(split, question, choices, template, args.seed)
    tell(args, f"{len(samples)} pictures of {samples.num_episodes} episodes: {question}")
    text = "more, of episodes that are kept apart by the hash of their names, are for the report"
    tell(args, f"{len(split.held_out)} {text}")
    steps = args.epochs * ceil(len(samples) / _SAMPLES)
    recipe = Recipe(
        steps,
        args.learning_rate,
        _WARMUP,
        weight_decay=_WEIGHT_DECAY,
        bfloat16=args.bfloat16,
        beta2=_BETA2,
        falls_linearly=True,
    )
    tuning = Tuning(recipe, _SAMPLES, args.at_once, args.lora, args.device, args.lora, adapts_vision=True)
    prompt = checkpoint.sidecar.get("prompt") or ("paligemma" if is_paligemma else "chat")
    data = {"sha256": split.sha256, "question": question, "choices": list(choices)}
    finetune(checkpoint, samples, tuning, prompt, checkpoint.sidecar.get("history") or 0, args.out, args.seed, data)
    result = {"out": str(args.out), "pictures": len(samples), "episodes": samples.num_episodes}
    table = f"{args.out}: .venv/bin/python -m vlm_local serve --model {args.out}"
    if split.held_out:
        scores, text = _score(args, question, choices, split.held_out)
        result, table = result | {"held_out": scores}, f"{text}\n{table}"
    print_result(args, table, result)


def _read(args: argparse.Namespace):
    """(question, choices, split) of all folders. Raises DataError where they do not ask the same."""
    from dataclasses import replace

    from vlm_local.answers import check_choices, complete_question
    from vlm_local.data.questions import open_labelled
    from vlm_local.training.labelled import split_by_episode

    folders = [(path, open_labelled(path, args.bgr, args.question)) for path in args.data]
    choices = folders[0][1].choices
    others = [path for path, labelled in folders if set(labelled.choices) != set(choices)]
    if others:
        raise DataError(f"{others[0]} has other answers than {args.data[0]}, which has {', '.join(choices)}")
    check_choices(list(choices))
    named = {args.question} if args.question else {each.question for _, each in folders if each.question}
    asked = {complete_question(question, choices) for question in named}
    if len(asked) != 1:
        said = "; ".join(sorted(asked)) or "none"
        raise DataError(f"the data name these questions: {said}; say with --question what the pictures answer")
    report = ProblemPrinter()
    split = split_by_episode(
        replace(each, episode=f"{path.name}/{each.episode}", source=f"{path.name}/{each.source}")
        for path, labelled in folders
        for each in labelled.open_images(report)
    )
    return asked.pop(), choices, split


def _score(args: argparse.Namespace, question: str, choices: tuple[str, ...], held_out) -> tuple[dict, str]:
    """The scores of `eval-answers` on the pictures that were kept apart, and their table."""
    from contextlib import closing

    from vlm_local.answers import Question
    from vlm_local.assembly import open_policies
    from vlm_local.cli.answers import format_report, pick_scores
    from vlm_local.lab.detector.run import evaluate_detector
    from vlm_local.policy_options import PolicyOptions
    from vlm_local.progress import open_bar

    options = PolicyOptions(model=str(args.out), device=args.device, offline=args.offline)
    with closing(open_policies(options)) as policies, open_bar("held out", len(held_out), "picture") as bar:
        answerer = policies.answerer
        assert answerer is not None  # a folder of a model has one
        about = {"policy": {"name": args.out.name, **policies.metadata}, "data": _REPORT, "question": question}
        report = evaluate_detector(
            held_out,
            choices,
            lambda image: answerer.answer(Question(image, question, choices)),
            args.out / _REPORT,
            _PRECISION,
            about,
            [],
            lambda: bar.update(),
        )
    return pick_scores(report), format_report(report, args.out / _REPORT)
