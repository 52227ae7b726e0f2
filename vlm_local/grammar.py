"""A finite grammar in a Lark file, and the sentences it holds. Knows no tokenizer.

The subset: rules and terminals made of quoted strings, alternatives, groups, optional parts and
bounded repetition. Spaces are written out, nothing is ignored between parts.
"""

import ast
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lark import Token, Tree
from lark.exceptions import LarkError, UnexpectedInput
from lark.load_grammar import load_grammar as load_lark

from vlm_local.errors import GrammarError, suggest
from vlm_local.files import find_shipped
from vlm_local.primitives import list_phrases, list_slight_phrases

DEFAULT = "primitives"
MAX_SENTENCES = 20_000


@dataclass(frozen=True)
class Grammar:
    """sentences: in file order, without duplicates; sha256: of the file's bytes."""

    name: str
    sentences: tuple[str, ...]
    sha256: str


# A sentence while it is put together: pieces of text with the line that each stands on.
_Pieces = tuple[tuple[str, int | None], ...]


def load_grammar(name: str | Path) -> Grammar:
    """Load a shipped grammar by name ("primitives") or any .lark file by path.

    Raises GrammarError with file, line and reason where it is missing, no Lark grammar, infinite,
    empty, or uses what has no finite list of sentences.
    """
    return _load(name)[0]


def load_phrase_grammar(name: str | Path = DEFAULT) -> Grammar:
    """`load_grammar`, and every sentence must be a movement phrase."""
    grammar, sentences = _load(name)
    phrases = frozenset(list_phrases() + list_slight_phrases())
    for sentence, pieces in sentences.items():
        if sentence not in phrases:
            line = _find_wrong_line(pieces)
            raise GrammarError(f"{name}, line {line}: {sentence!r} is no movement phrase, so no robot can execute it")
    return grammar


def _load(name: str | Path) -> tuple[Grammar, dict[str, _Pieces]]:
    path = Path(name) if str(name).endswith(".lark") else find_shipped("grammars") / f"{name}.lark"
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError:
        shipped = sorted(file.stem for file in find_shipped("grammars").glob("*.lark"))
        raise GrammarError(
            f"grammar {name}: there is no file {path}{suggest(path.stem, shipped)}; the shipped grammars are "
            f"{', '.join(shipped)}"
        ) from None
    except UnicodeDecodeError as error:
        raise GrammarError(f"{path} is not UTF-8 text: {error}") from None
    sentences = _Enumeration(str(path), text).list_sentences()
    return Grammar(path.stem, tuple(sentences), hashlib.sha256(data).hexdigest()), sentences


def _explain_syntax(source: str, text: str, error: LarkError) -> str:
    """One line: Lark's own message has several, in the names of its parser's states."""
    at = error if isinstance(error, UnexpectedInput) else error.__context__
    if not isinstance(at, UnexpectedInput):
        return f"{source} is not a Lark grammar: {error}"
    (line,) = text.splitlines()[at.line - 1 : at.line] or [""]
    return f"{source}, line {at.line}: this is not a Lark grammar from column {at.column} on: {line.rstrip()}"


class _Enumeration:
    """Lists what Lark's own syntax tree of a grammar file can say, in the order it is written."""

    def __init__(self, source: str, text: str):
        self._source = source
        try:
            tree, _ = load_lark(text, source, [], False)
        except LarkError as error:
            raise GrammarError(_explain_syntax(source, text, error)) from None
        if tree.ignore:
            raise GrammarError(f"{source}: %ignore is not supported; write every space of a sentence out")
        for name, parameters, *_ in tree.rule_defs:
            if parameters:
                raise GrammarError(f"{source}: rule '{name}' has parameters; templates are not supported")
        self._trees = {name: body for name, _, body, _ in tree.rule_defs}
        self._trees |= {name: body for name, (body, _) in tree.term_defs}
        if None in self._trees.values():
            raise GrammarError(f"{source}: %declare is not supported; write the words as quoted strings")
        self._lines = {name: getattr(name, "line", 1) for name in self._trees}
        self._open: list[str] = []  # names being expanded, innermost last
        self._lists: dict[str, list[_Pieces]] = {}

    def list_sentences(self) -> dict[str, _Pieces]:
        if "start" not in self._trees:
            raise GrammarError(f"{self._source} has no rule 'start'")
        sentences: dict[str, _Pieces] = {}
        for pieces in self._expand_name("start"):
            sentences.setdefault("".join(text for text, _ in pieces), pieces)
        if not sentences or "" in sentences:
            line = _first_line(self._trees["start"])
            raise GrammarError(f"{self._source}, line {line}: the grammar is empty or can say nothing at all")
        return sentences

    def _fail(self, line: int | None, reason: str) -> NoReturn:
        raise GrammarError(f"{self._source}, line {line}: {reason}")

    def _expand_name(self, name: str) -> list[_Pieces]:
        if name in self._open:
            self._fail(self._lines[self._open[-1]], f"'{name}' leads back to itself, so the grammar is infinite")
        if name not in self._lists:
            self._open.append(name)
            self._lists[name] = self._collect(self._expand(self._trees[name]), self._lines[name])
            self._open.pop()
        return self._lists[name]

    def _collect(self, items: Iterator[_Pieces], line: int) -> list[_Pieces]:
        collected = list(itertools.islice(items, MAX_SENTENCES + 1))
        if len(collected) > MAX_SENTENCES:
            self._fail(line, f"the grammar holds more than {MAX_SENTENCES} sentences")
        return collected

    def _expand(self, node) -> Iterator[_Pieces]:
        match node.data:
            case "expansions":
                for child in node.children:
                    yield from self._expand(child)
            case "alias":
                yield from self._expand(node.children[0])
            case "expansion":
                parts = [self._collect(self._expand(child), _first_line(child)) for child in node.children]
                for choice in itertools.product(*parts):
                    yield tuple(itertools.chain.from_iterable(choice))
            case "value" | "literal" | "nonterminal" | "terminal":
                yield from self._expand_leaf(node.children[0])
            case "maybe":
                yield ()
                yield from self._expand(node.children[0])
            case "expr":
                yield from self._expand_repeat(*node.children)
            case other:
                self._fail(_first_line(node), f"{other!r} is not supported; write the words as quoted strings")

    def _expand_leaf(self, leaf) -> Iterator[_Pieces]:
        if isinstance(leaf, Tree):
            yield from self._expand(leaf)
        elif getattr(leaf, "type", None) == "STRING":
            yield ((self._read_words(leaf), leaf.line),)
        elif getattr(leaf, "type", None) == "REGEXP":
            self._fail(leaf.line, f"the pattern {leaf} is not supported; write the words as quoted strings")
        else:  # a rule or terminal of lark, by name
            yield from self._expand_name(leaf.name)

    def _read_words(self, leaf: Token) -> str:
        if not leaf.endswith('"'):
            self._fail(leaf.line, f"{leaf} has a flag; write the words as they are said")
        try:
            return ast.literal_eval(str(leaf))
        except (SyntaxError, ValueError) as error:
            self._fail(leaf.line, f"the words {leaf} cannot be read: {error.args[0]}")

    def _expand_repeat(self, item, operator: Any, *bounds) -> Iterator[_Pieces]:
        if str(operator) in ("*", "+"):
            self._fail(operator.line, f"{str(operator)!r} repeats without end, so the grammar is infinite")
        least, most = (0, 1) if str(operator) == "?" else (int(bounds[0]), int(bounds[-1]))
        if least < 0:
            self._fail(operator.line, f"it repeats {least} times")
        choices = self._collect(self._expand(item), _first_line(item))
        for count in range(least, most + 1):
            for choice in itertools.product(choices, repeat=count):
                yield tuple(itertools.chain.from_iterable(choice))


def _first_line(node) -> int:
    """Line of the first quoted string below a node of Lark's tree, 1 where there is none."""
    return next((token.line for token in node.scan_values(lambda leaf: isinstance(leaf, Token))), 1)


def _find_wrong_line(pieces: _Pieces) -> int | None:
    """Line of the first piece after which no movement phrase can follow any more."""
    text = ""
    for piece, line in pieces:
        text += piece
        if not any(phrase.startswith(text) for phrase in list_phrases() + list_slight_phrases()):
            return line
    return pieces[-1][1]
