"""`train`: make the embedded checkpoint, fine-tune any model folder on recorded episodes."""

from pathlib import Path

from vlm_local.cli.detector import add_detector
from vlm_local.cli.options import (
    MAX_COUNT,
    MAX_HISTORY,
    add_data_options,
    add_embodiment_option,
    count,
    number,
    read_data_options,
    seed,
)
from vlm_local.cli.output import ProblemPrinter, describe_data, print_result, tell
from vlm_local.errors import ConfigError


def add_commands(subparsers) -> None:
    train = subparsers.add_parser("train", help="fine-tune a model on recorded episodes, or make the embedded one")
    ways = train.add_subparsers(dest="way", metavar="WAY", required=True)
    _add_finetune(ways.add_parser("finetune", help="fine-tune a model folder on recorded episodes with ECoT's labels"))
    add_detector(ways.add_parser("detector", help="fine-tune a success detector on labelled pictures"))
    _add_tiny(ways.add_parser("tiny", help="train the embedded checkpoint in the simulator"))
    mean = ways.add_parser("mean", help="write a model whose weights are the mean of several trained ones")
    mean.add_argument("models", type=Path, nargs="+", metavar="FOLDER", help="of one architecture; two or more")
    mean.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    mean.set_defaults(run=_run_mean)
    init = ways.add_parser("init-tiny", help="write the embedded checkpoint's folder with untrained weights")
    init.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    init.add_argument("--seed", type=seed, default=0)
    init.set_defaults(run=_run_init_tiny)


def _add_finetune(parser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a name (see `models`), folder or repository")
    add("--data", required=True, nargs="+", metavar="PATH", help="RLDS, LeRobot, AutoEval pickles or recorded runs")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the result; a killed run goes on from there")
    add("--camera", metavar="NAME", help="[the data set's main one]")
    add_data_options(parser)
    add_embodiment_option(parser)
    add("--lora", type=count(0, 4096), default=0, metavar="RANK", help="train adapters of this rank [0: all weights]")
    add("--steps", type=count(1, 10 * MAX_COUNT), default=1000, metavar="N", help="[1000]")
    add("--samples", type=count(1, 4096), default=16, metavar="N", help="of a step [16]")
    add("--at-once", type=count(1, 4096), default=4, metavar="N", help="samples in one forward: as memory allows [4]")
    add("--learning-rate", type=number(1e-9, 1), metavar="R", help="[1e-5; 2e-4 with --lora]")
    add("--warmup", type=count(0, 10 * MAX_COUNT), default=50, metavar="N", help="steps [50]")
    add("--prompt", metavar="NAME|FILE", help="[the checkpoint's, else the family's]")
    text = "last phrases that the prompt shows [the checkpoint's, else 0]"
    add("--history", type=count(0, MAX_HISTORY), metavar="N", help=text)
    add("--bfloat16", action="store_true", help="compute in bfloat16; trained weights stay float32")
    add("--device", default="auto", metavar="auto|cpu|cuda:N", help="[auto: the first GPU]")
    add("--offline", action="store_true", help="download nothing")
    add("--seed", type=seed, default=0)
    parser.set_defaults(run=_run_finetune, goes_on="the same command goes on from the last saved step")


def _add_tiny(parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="RUN", help="run folder; a killed run goes on from there")
    add("--start", type=Path, metavar="FOLDER", help="weights to begin with [untrained ones, drawn from --seed]")
    add("--rounds", type=count(), metavar="N", help="[the course of docs/training.md]")
    add("--task", metavar="T", help="one task of `sim` alone [all]")
    text = "the variant that also sees an episode's first picture, for tasks that need memory; begins with --start"
    add("--memory", action="store_true", help=text)
    add("--seed", type=seed, default=0)
    parser.set_defaults(run=_run_tiny, goes_on="the same command goes on from the last finished round")


def _run_mean(args) -> None:
    from vlm_local.training.tiny import write_mean

    if len(args.models) < 2:
        raise ConfigError("one model is its own mean; name two or more")
    _refuse_filled(args.out)
    write_mean(args.models, args.out)
    table = f"{args.out}: .venv/bin/python -m vlm_local sim --policy {args.out} --task all"
    print_result(args, table, {"out": str(args.out), "models": len(args.models)})


def _refuse_filled(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; choose another --out")


def _run_init_tiny(args) -> None:
    from vlm_local.training.tiny import write_tiny

    _refuse_filled(args.out)
    write_tiny(args.out, args.seed)
    print(f"wrote untrained weights and the tokenizer, processor and prompt around them to {args.out}")


def _run_finetune(args) -> None:
    import hashlib

    from vlm_local.data import count_episodes, open_data_set
    from vlm_local.embodiments import AUTO, BRIDGE, load_embodiment
    from vlm_local.models import find_checkpoint
    from vlm_local.progress import track
    from vlm_local.prompts import check_history, load_template
    from vlm_local.training.finetune import Tuning, finetune
    from vlm_local.training.optimisation import Recipe
    from vlm_local.training.samples import HELD_OUT_EVERY, RecordedSamples, hash_episodes

    checkpoint = find_checkpoint(args.model, args.offline)
    default = "paligemma" if checkpoint.family.startswith("paligemma") else "chat"
    prompt = args.prompt or checkpoint.sidecar.get("prompt") or default
    history = args.history if args.history is not None else checkpoint.sidecar.get("history") or 0
    problems, digest = ProblemPrinter(), hashlib.sha256()
    data_sets = [open_data_set(path, read_data_options(args), problems) for path in args.data]
    num_episodes = sum(count_episodes(path, args.split) for path in args.data)
    read = (episode for data in data_sets for episode in data.episodes)
    episodes = track(read, "reading", "episode", num_episodes)
    embodiment = args.embodiment or checkpoint.sidecar.get("embodiment") or AUTO
    template = load_template(prompt, load_embodiment(BRIDGE if embodiment == AUTO else embodiment).camera)
    check_history(args.history, template)
    samples = RecordedSamples(hash_episodes(episodes, digest), template, history, args.seed, problems)
    for path, data in zip(args.data, data_sets, strict=True):
        tell(args, f"{path}: {describe_data(data.about)}")
    found = f"{len(samples)} labelled steps of {samples.num_episodes} episodes, {samples.num_skipped} episodes skipped"
    tell(args, found)
    if samples.num_held_out:
        apart = f"of one in {HELD_OUT_EVERY} episodes, are kept apart; log.jsonl has their loss"
        tell(args, f"{samples.num_held_out} more, {apart}")
    rate = args.learning_rate or (2e-4 if args.lora else 1e-5)
    recipe = Recipe(args.steps, rate, warmup_steps=args.warmup, bfloat16=args.bfloat16)
    tuning = Tuning(recipe, args.samples, args.at_once, args.lora, args.device)
    data = {"sha256": digest.hexdigest(), "camera": args.camera}
    data |= {"held_out_steps": samples.num_held_out} if samples.num_held_out else {}
    finetune(checkpoint, samples, tuning, prompt, history, args.out, args.seed, data, embodiment)
    print_result(args, f"{args.out}: .venv/bin/python -m vlm_local serve --model {args.out}", {"out": str(args.out)})


def _run_tiny(args) -> None:
    from vlm_local.training.simulated import train_memory, train_tiny

    if args.memory and (args.start is None or args.task is not None):
        raise ConfigError("--memory begins with the weights of --start FOLDER, and takes no --task")
    if args.memory:
        student = train_memory(args.out, args.seed, args.start, args.rounds)
    else:
        student = train_tiny(args.out, args.seed, args.start, args.rounds, args.task)
    tasks = "reach_shown,put_back" if args.memory else "all"
    table = f"{student}: .venv/bin/python -m vlm_local sim --policy {student} --task {tasks}"
    print_result(args, table, {"out": str(student)})
