"""Results that others can check: pack, verify, leaderboard."""

import argparse
from pathlib import Path

from vlm_local.cli.output import print_result

_DEFAULT = "FOLDER.evidence.zip"
_BOARD = Path("results/leaderboard.md")


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("pack", help="one archive of a result folder, for others to verify")
    parser.add_argument("folder", type=Path, metavar="RESULT", help="--out folder of a finished eval, sim, spatial ...")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"[{_DEFAULT}]")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--no-pictures", action="store_true", help="without frames and films; all scores stay")
    text = "frames and films of this one only, e.g. reach-3; may be given again; all scores stay"
    shown.add_argument("--episode", action="append", default=[], metavar="NAME", help=text)
    parser.set_defaults(run=_pack)

    parser = subparsers.add_parser("verify", help="score a result again without its weights")
    parser.add_argument("result", type=Path, metavar="ARCHIVE", help="of pack; also a result folder")
    parser.set_defaults(run=_verify)

    parser = subparsers.add_parser(
        "leaderboard", help="a Markdown page of `sim` and `spatial` results, each verified first"
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="archives of pack, or folders")
    parser.add_argument("--out", type=Path, default=_BOARD, metavar="FILE", help=f"[{_BOARD}]")
    parser.set_defaults(run=_leaderboard)

    parser = subparsers.add_parser("card", help="write verified `sim` results into the model card of their checkpoint")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the checkpoint; its README.md says where they go")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="archives of pack, or folders")
    parser.set_defaults(run=_card)


def _pack(args: argparse.Namespace) -> None:
    from vlm_local.lab.evidence.archive import pack, seal

    folder = args.folder.resolve()
    out = args.out or folder.with_name(folder.name + _DEFAULT.removeprefix("FOLDER"))
    manifest = pack(args.folder, out, not args.no_pictures, args.episode)
    size, count = out.stat().st_size, len(manifest["files"])
    table = f"{out}: {count} files of `{manifest['kind']}`, {size / 1e3:,.0f} kB\nseal {seal(manifest)}"
    about = {"out": str(out), "kind": manifest["kind"], "files": count, "bytes": size, "seal": seal(manifest)}
    print_result(args, table, about)


def _verify(args: argparse.Namespace) -> None:
    verdict = _verify_with_bar(args.result)
    lines = [
        f"seal {verdict.seal}: {verdict.num_files} files of `{verdict.kind}`, as they were packed",
        f"all {verdict.num_numbers} numbers that are scored follow from what is in it",
    ]
    if verdict.kind == "sim":
        lines.append("every episode was played again from its seed and actions, and came out the same")
    lines.append(f"taken on trust, for nothing in it can prove it: {', '.join(verdict.trusted)}")
    result = {"seal": verdict.seal, "kind": verdict.kind, "files": verdict.num_files, "numbers": verdict.num_numbers}
    print_result(args, "\n".join(lines), result | {"trusted": list(verdict.trusted)})


def _leaderboard(args: argparse.Namespace) -> None:
    from vlm_local.lab.evidence.leaderboard import write_leaderboard

    num_rows = write_leaderboard([_verify_with_bar(path) for path in args.results], args.out)
    print_result(args, f"{num_rows} rows: {args.out}", {"rows": num_rows, "out": str(args.out)})


def _card(args: argparse.Namespace) -> None:
    from vlm_local.lab.evidence.card import write_card

    num_results = write_card(args.folder, [_verify_with_bar(path) for path in args.results])
    print_result(args, f"{num_results} results in {args.folder}", {"results": num_results, "out": str(args.folder)})


def _verify_with_bar(path: Path):
    """`verify` with a bar for what is played again."""
    from vlm_local.lab.evidence.verify import verify
    from vlm_local.progress import open_bar

    with open_bar(path.name, unit="scene", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return verify(path, show)
