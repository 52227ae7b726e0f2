"""`compare`: results side by side on the trials that all of them have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

_EPILOG = (
    "eval: the same steps. sim: the same tasks and seeds. spatial: the same scenes. What cannot be compared is refused "
    "with the reason."
)


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare", help="results on the same steps, episodes or scenes, with p-values", epilog=_EPILOG
    )
    parser.description = "Compares results of one kind, paired: scores, differences of all pairs, intervals, p-values."
    add = parser.add_argument
    add("results", nargs="+", metavar="RESULT", type=Path, help="two or more --out folders of eval, sim or spatial")
    text = "of the first, second ... result in all tables; may be given again [its folder's]"
    add("--name", action="append", default=[], metavar="A=NAME", help=text)
    add("--out", type=Path, metavar="DIR", help="also Markdown, CSV, LaTeX, and figures as PDF and SVG, for a paper")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from vlm_local.errors import ConfigError
    from vlm_local.lab.comparison import LETTERS, compare, format_comparison
    from vlm_local.provenance import describe_machine

    if not 2 <= len(args.results) <= len(LETTERS):
        raise ConfigError(f"compare takes 2 to {len(LETTERS)} results, not {len(args.results)}")
    names = _read_names(args.name, args.results)
    result = compare([_load_trials(path) for path in args.results], names)
    print(format_comparison(result))
    if args.out is not None:
        from vlm_local.lab.publication import write_publication

        paths = write_publication(args.out, result, describe_machine())
        print(f"\n{args.out}: {', '.join(path.name for path in paths)}")
    return 0


def _load_trials(folder: Path):
    """A result of any study that can be compared."""
    from vlm_local.lab.results import find_layout

    kind = find_layout(folder).kind
    if kind == "eval":
        from vlm_local.lab.offline.trials import load_trials
    elif kind == "sim":
        from vlm_local.lab.closed_loop.trials import load_trials
    else:
        from vlm_local.lab.spatial.trials import load_trials
    return load_trials(folder)


def _read_names(given: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """By letter where --name says so, else the folders' own names; as they were given, where two are alike."""
    from vlm_local.errors import ConfigError
    from vlm_local.lab.comparison import LETTERS

    short = [folder.resolve().name for folder in folders]
    names = dict(zip(LETTERS, short if len(set(short)) == len(short) else map(str, folders), strict=False))
    for text in given:
        letter, equals, name = text.partition("=")
        if letter not in names or not equals or not name.strip():
            raise ConfigError(f"--name {text!r}: expected A=NAME, with a letter from A to {max(names)}")
        names[letter] = name.strip()
    if len(set(names.values())) < len(names):
        raise ConfigError(f"two results have the same name: {', '.join(names.values())}; tell them apart with --name")
    return list(names.values())
