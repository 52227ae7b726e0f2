import lark
import pytest

from vlm_local.errors import GrammarError
from vlm_local.files import find_shipped
from vlm_local.grammar import load_grammar, load_phrase_grammar
from vlm_local.primitives import is_labelable, list_phrases, parse_phrase


def test_the_default_grammar_holds_the_729_phrases_and_no_other():
    sentences = load_phrase_grammar().sentences
    assert len(sentences) == 729
    assert set(sentences) == set(list_phrases())


def test_the_labelable_grammar_holds_what_a_label_can_be():
    labelable = {phrase for phrase in list_phrases() if is_labelable(parse_phrase(phrase))}
    assert set(load_phrase_grammar("primitives_labelable").sentences) == labelable


@pytest.mark.parametrize(
    ("name", "count"), [("primitives_no_rotation", 81), ("primitives_moves", 27), ("primitives_slightly", 1455)]
)
def test_other_grammars(name, count):
    assert len(load_phrase_grammar(name).sentences) == count


@pytest.mark.parametrize("path", sorted(find_shipped("grammars").glob("*.lark")), ids=lambda path: path.stem)
def test_lark_itself_parses_every_sentence_listed(path):
    parser = lark.Lark(path.read_text(), parser="earley", lexer="dynamic_complete")
    for sentence in load_grammar(path).sentences[::7]:
        parser.parse(sentence)
    with pytest.raises(lark.exceptions.UnexpectedInput):
        parser.parse("go left")


def _write(tmp_path, text: str):
    path = tmp_path / "my.lark"
    path.write_text(text)
    return path


def test_sentences_come_in_file_order_and_once(tmp_path):
    path = _write(tmp_path, 'start: "move " WAY ["!"] | "move up" | ("a" | "b")~2..3\nWAY: "up" | "down"\n')
    sentences = load_grammar(path).sentences
    assert sentences[:5] == ("move up", "move up!", "move down", "move down!", "aa")
    assert len(sentences) == 4 + 4 + 8


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('start: "stop"\n     | loop\nloop: "move up" loop | "stop"', 3, "infinite"),
        ('start: "stop"\n     | "move up"*', 2, "infinite"),
        ('start: "stop"\n     | "move up"+', 2, "infinite"),
        ('start: ["stop"]', 1, "empty"),
        ("start:", 1, "empty"),
        ("start: WORD\nWORD: /[a-z]+/", 2, "pattern"),
        ('start: "stop" | "a".."z"', 1, "range"),
        ('start: "stop"i', 1, "flag"),
        ('start: "move " ("up"\n  | "sideways")', 2, "no movement phrase"),
        ('start: "stop"\n  | "move "', 2, "no movement phrase"),
        ('start: D~12\nD: "a" | "b" | "c"', 1, "more than"),
    ],
)
def test_a_grammar_that_cannot_drive_a_robot_is_refused_with_line_and_reason(tmp_path, text, line, reason):
    with pytest.raises(GrammarError, match=rf"my\.lark, line {line}: .*{reason}"):
        load_phrase_grammar(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("start: (", "line 1: this is not a Lark grammar from column 9 on: start: \\($"),
        ("start: 'stop'", "line 1: this is not a Lark grammar from column 8 on: start: 'stop'$"),
        ('start: "stop" |\n stop', "line 2: this is not a Lark grammar from column 6 on:  stop$"),
        ('start: "stop" "', "line 1: this is not a Lark grammar from column 15 on"),
        ('start: "a" other', "not defined"),
        ('begin: "stop"', "no rule 'start'"),
        ('start: "stop"\n%ignore " "', "%ignore"),
        ('start: pair{"a"}\npair{x}: x x', "parameters"),
        ('start: "stop"\n| "\\x"', r'line 2: the words "\\x" cannot be read: '),
        ('start: "st\0op"', "cannot be read: source code"),
        ('start: "stop"~-1', "line 1: it repeats -1 times"),
        ('start: "stop"\n%declare OTHER', "%declare"),
    ],
)
def test_a_file_that_is_no_usable_grammar_is_refused(tmp_path, text, reason):
    with pytest.raises(GrammarError, match=reason):
        load_grammar(_write(tmp_path, text))


def test_a_missing_grammar_names_those_there_are():
    with pytest.raises(GrammarError, match="primitives_labelable"):
        load_grammar("nonesuch")
