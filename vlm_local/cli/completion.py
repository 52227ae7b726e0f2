"""`completion`: a script that has bash complete commands, options and choices."""

import argparse
import shlex

from vlm_local.cli.parser import CommandParser

_HELP = "print a script by which bash completes commands and options"
# Words are offered for a command or an option; for everything else -o default leaves names of files.
_SCRIPT = """_vlm_local() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= words= word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{command:+$command }}$word" in
            {commands}) command="${{command:+$command }}$word" ;;
        esac
    done
    case "$command $previous" in
{choices}
        *) case "$command" in
{words}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _vlm_local vlm-local"""


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("completion", help=_HELP)
    parser.description = (
        f"{_HELP[:1].upper()}{_HELP[1:]}. Put this line into ~/.bashrc: "
        "source <(FOLDER/.venv/bin/vlm-local completion bash)"
    )
    parser.add_argument("shell", choices=("bash",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from vlm_local.cli import build_parser

    print(build_script(build_parser()))


def build_script(parser: CommandParser) -> str:
    """What follows each command, and the values of options that have a few."""
    words, choices = [], []
    for path, node in parser.walk():
        name, options = " ".join(path), node.list_options()
        if node.commands is None:
            offered = f"[[ $current == -* ]] && words={shlex.quote(' '.join(options))}"
        else:
            offered = f"words={shlex.quote(' '.join([*node.commands.choices, *options]))}"
        words.append(f"            {shlex.quote(name)}) {offered} ;;")
        for spelling, action in options.items():
            if action.choices is not None:
                values = shlex.quote(" ".join(map(str, action.choices)))
                choices.append(f"        {shlex.quote(f'{name} {spelling}')}) words={values} ;;")
    commands = "|".join(shlex.quote(" ".join(path)) for path, _ in parser.walk() if path)
    return _SCRIPT.format(commands=commands, words="\n".join(words), choices="\n".join(choices))
