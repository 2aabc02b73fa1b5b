"""JSON piece by piece: the same values as in one piece, wherever the window ends."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ezsd.data.stream import JsonError, JsonReader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def read(text, window):
    """Everything in a document, lists entry by entry."""
    reader = JsonReader(io.StringIO(text), window)
    found = {}
    for key in reader.members():
        found[key] = list(reader.entries()) if reader.peek() == "[" else reader.value()
    if reader.peek():
        raise JsonError("more")
    return found


@given(
    document=st.dictionaries(st.text(max_size=4), VALUES, max_size=4),
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_any_window_reads_what_one_piece_holds(document, window, indent, ascii_only):
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    assert read(text, window) == document


def test_numbers_that_json_does_not_know_are_read():
    assert repr(read('{"a": [NaN, -Infinity, 1e400]}', 3)) == "{'a': [nan, -inf, inf]}"


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a"',
        '{"a": }',
        '{"a": 1',
        '{"a": [1,]}',
        '{"a": [1 2]}',
        '{"a": 1} x',
        '{"a": "x',
        "{1: 2}",
        '{"a": tru}',
    ]
    + ['{"a": [{"b": nul}, 1, 2, 3, 4, 5]}', '{"a": "\\u12"}', '{"a": [' + "[" * 100_000],
)
def test_what_is_no_json_is_refused(text, window):
    with pytest.raises(JsonError):
        read(text, window)


@pytest.mark.parametrize("window", [1, 4310, 100_000])
def test_a_whole_number_longer_than_python_takes_is_refused_where_it_stands(window):
    with pytest.raises(JsonError, match="more than 4300 digits at character 13"):
        read('{"a": [1, 2, -' + "7" * 4301 + ", 3]}", window)


@pytest.mark.parametrize("window", [1, 4310, 100_000])
def test_a_fraction_may_have_any_number_of_digits(window):
    assert read('{"a": [' + "7" * 4310 + "e-4309, 3]}", window) == {"a": [7.777777777777778, 3]}


def test_an_error_in_the_middle_is_told_without_reading_to_the_end():
    file = io.StringIO('{"a": [1, 2, {"b": x}, ' + "0, " * 100_000 + "0]}")
    with pytest.raises(JsonError, match="at character 19"):
        list(read_all(file))
    assert file.tell() < 200


def read_all(file):
    reader = JsonReader(file, 32)
    for _ in reader.members():
        yield from reader.entries()
