"""TOML files are read in bounded time, and as tomllib reads them."""

import tomllib

import pytest

from ezsd.pipeline.data.toml_files import read_toml

DOTS = "a." * 200_000
"""As parts of a key, more than an hour of tomllib's time."""
READABLE = [
    'name = "farm"\n[classes]\nbase = ["a.b", \'c.d\']\n',
    f"name = \"{DOTS}\"\nother = '{DOTS}'\n",
    f'name = """{DOTS}\n"two" quotes\\""""" # {DOTS}\nother = \'\'\'\n{DOTS}\'\'\'\n',
    'empty = ""\nmany = """"""\nends = """one quote""""\nother = \'\'\'two quotes\'\'\'\'\'\n',
    f'"{DOTS}".b = 1\n',
    ".".join(["a"] * 100) + " = 1\n",
]
REFUSED = [
    f"{DOTS}a = 1\n",
    f"[{DOTS}a]\n",
    f"x = {{{DOTS}a = 1}}\n",
    f'x = """a""""", y\ny = """b\n"""""\n"" . {DOTS}a = 1\n',
    f'x = "#"\nx = \'"\'\n{DOTS}a = "b"\n',
    f'x = """"""\nx = """\\"""{DOTS}"""\n{DOTS}a = 1 # """\n',
]


@pytest.mark.parametrize("text", READABLE, ids=range(len(READABLE)))
def test_a_file_is_read_as_tomllib_reads_it(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    assert read_toml(tmp_path / "a.toml") == tomllib.loads(text)


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_key_of_too_many_parts_is_refused_with_its_line(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    line = 1 + max(number for number, one in enumerate(text.split("\n")) if DOTS in one)
    with pytest.raises(ValueError, match=f"^line {line}: more than 100 dots"):
        read_toml(tmp_path / "a.toml")


ENDLESS = ['"', "'''", '"""' + '\\"""' * 200_000, '"' * 1_000_001, "x = 1 \\ " * 100_000]


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
def test_what_does_not_end_is_not_toml(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(tomllib.TOMLDecodeError):
        read_toml(tmp_path / "a.toml")


def test_numbers_with_a_dot_belong_on_several_lines(tmp_path):
    numbers = ["0.5"] * 120
    (tmp_path / "a.toml").write_text(f"x = [{', '.join(numbers)}]\n")
    with pytest.raises(ValueError, match="^line 1: more than 100 dots outside of texts; write it as several lines$"):
        read_toml(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("x = [\n" + ",\n".join(numbers) + "]\n")
    assert read_toml(tmp_path / "a.toml") == {"x": [0.5] * 120}
