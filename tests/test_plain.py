import logging

import pytest

from vlm_local.plain import PlainFormatter, escape_controls, hide_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:8000/t/verysecret/s/left", "http://host:8000/t/***/s/left"),
        ("https://me:word@host/robots/t/verysecret", "https://host/robots/t/***"),
        ("http://host/v1?api_key=abc&n=1&token=def#x", "http://host/v1?api_key=***&n=1&token=***#x"),
        ("no answer from http://host/t/verysecret/act (timed out)", "no answer from http://host/t/***/act (timed out)"),
        ('{"a": "http://u:p@h/t/s1", "b": "http://h/t/s2"}', '{"a": "http://h/t/***", "b": "http://h/t/***"}'),
        ("/data/t/model", "/data/t/model"),
        ("qwen2-vl", "qwen2-vl"),
    ],
)
def test_urls_are_shown_without_their_secrets(text, shown):
    assert hide_secrets(text) == shown


def test_text_of_others_moves_no_cursor_and_begins_no_line():
    assert escape_controls("a\n\x1b[2J\x9b1m\u202eb\u2028\ud800\t") == r"a\n\x1b[2J\x9b1m\u202eb\u2028\ud800\t"
    assert escape_controls("put the café cup\n", "\n") == "put the café cup\n"


def test_a_record_is_one_line_of_the_log_and_its_traceback_is_indented():
    try:
        raise ValueError("first\n2026-01-01 INFO forged\x1b[2J http://h/t/verysecret/act")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "bad %s", ("\n2026 INFO forged",), None)
        record.exc_info = type(error), error, error.__traceback__
    first, *rest = PlainFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first == r"ERROR bad \n2026 INFO forged"
    assert rest and all(line.startswith("    ") for line in rest)
    assert not any("\x1b" in line or "verysecret" in line for line in rest)
