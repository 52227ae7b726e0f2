"""`models` prints the registry, `fetch` brings a model to this machine."""

import argparse


def add_commands(subparsers) -> None:
    models = subparsers.add_parser("models", help="the models by name: size, memory, what is present")
    models.set_defaults(run=_list_models)
    fetch = subparsers.add_parser("fetch", help="download a model")
    fetch.add_argument("name", metavar="NAME", help="a name of `models`, or a repository of the hub (org/name)")
    fetch.add_argument("--offline", action="store_true", help="download nothing: only say where it is")
    fetch.set_defaults(run=_fetch, goes_on="the same command goes on with what is here already")


def _list_models(args: argparse.Namespace) -> None:
    from vlm_local.models import find_local
    from vlm_local.registry import MODELS
    from vlm_local.weights import count_weights, estimate_memory

    rows: list[tuple[str, ...]] = [
        ("name", "repository", "weights", "download", "bf16", "8bit", "4bit", "on this machine")
    ]
    for model in MODELS:
        folder = find_local(model.name)
        linear, rest = (model.linear, model.rest) if model.repository or not folder else count_weights(folder)
        memory = {kind: estimate_memory(linear, rest, kind) for kind in model.quantizations}
        download = f"{model.download_bytes / 1e9:.1f} GB" if model.repository else "-"
        rows.append(
            (
                model.name,
                (model.repository or "ships with the project") + (" (licence)" if model.gated else ""),
                _scale(linear + rest),
                download,
                *(_tell_bytes(memory.get(kind)) for kind in ("none", "8bit", "4bit")),
                str(folder or "no"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nMemory is of the weights alone; `doctor` says what fits here. (licence): accept it on the hub first.")


def _tell_bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def _scale(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.1f} M"


def _fetch(args: argparse.Namespace) -> None:
    from vlm_local.models import fetch

    print(fetch(args.name, args.offline))
