"""The parser of the command line: commands in groups, short errors that name the nearest spelling."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlm_local.errors import suggest

# A model is served, tuned and trained; a policy, which may also be a server or a baseline, is judged.
_OTHER_NAMES = {"--model": "--policy", "--policy": "--model"}


class Commands(argparse._SubParsersAction):
    """Subcommands. `help` of a command is also its description, unless it has a longer one."""

    def add_parser(self, name: str, *, help: str | None = None, **kwargs: Any) -> "CommandParser":
        summary = help or ""
        kwargs.setdefault("description", f"{summary[:1].upper()}{summary[1:]}.")
        parser = super().add_parser(name, help=summary, **kwargs)
        parser.summary = summary
        return parser


class CommandParser(argparse.ArgumentParser):
    """summary: one line about the command. commands: its subcommands, None for a command that runs."""

    summary = ""
    commands: Commands | None = None

    def add_subparsers(self, **kwargs: Any) -> Commands:
        commands = super().add_subparsers(action=Commands, **kwargs)
        assert isinstance(commands, Commands)
        self.commands = commands
        return commands

    def walk(self, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], "CommandParser"]]:
        """(words, parser) of this parser and of all commands below it, e.g. ("bench",) and ("bench", "act")."""
        yield words, self
        for word, parser in self.commands.choices.items() if self.commands else ():
            yield from parser.walk((*words, word))

    def describe_groups(self, groups: Mapping[str, Sequence[str]]) -> str:
        """The subcommands with their summaries, by groups; those of no group come last."""
        assert self.commands is not None
        choices = self.commands.choices
        grouped = {name for names in groups.values() for name in names}
        rest = [name for name in choices if name not in grouped]
        blocks = []
        for title, names in {**groups, "other": rest}.items():
            lines = [f"  {name:14}{choices[name].summary}" for name in names]
            blocks += ["\n".join([f"{title}:", *lines])] if lines else []
        return "\n\n".join(blocks)

    def list_options(self) -> dict[str, argparse.Action]:
        """Spelling -> action, e.g. "--model"."""
        return {spelling: action for action in self._actions for spelling in action.option_strings}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"`{self.prog} --help` lists what it takes\n{self.prog}: {message}\n")

    # argparse overloads it by the namespace's type; nobody gives one here.
    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and self.commands is None:
            wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            if wrong is None:
                self.error(f"nothing is expected after the rest: {' '.join(unknown)}")
            options = self.list_options()
            other = _OTHER_NAMES.get(wrong)
            nearest = f"; did you mean {other}?" if other in options else suggest(wrong, options)
            self.error(f"there is no option {wrong}{nearest}")
        return found, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Refuse an empty text, such as "$UNSET" in a script: it would mean the default, or this folder."""
        is_text = action.type in (None, str, Path) and action.nargs != argparse.PARSER  # all that follows a command
        if is_text and any(not text.strip() for text in arg_strings):
            raise argparse.ArgumentError(action, "is empty")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            nearest = suggest(str(value), known) or f"; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}{nearest}")
