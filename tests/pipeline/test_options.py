"""Parameters of messages are options on the command line, and nothing else is touched."""

import pytest

from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.console.options import as_options


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("`weights=/a b/c.pth`: no such file", "--weights '/a b/c.pth': no such file"),
        ("gone; give `data_root=DIR`", "gone; give --data-root DIR"),
        ("choose another `run` folder, or `device=cpu`", "choose another --run folder, or --device cpu"),
        ("(`reuse=a` `out=STORE`):", "(--reuse a --out STORE):"),
        ("`overrides` model.heads=fast: unknown", "--set model.heads=fast: unknown"),
        ("`overrides`, [eval] nms_iou: expected", "--set, [eval] nms_iou: expected"),
        ("the option `device`?", "the option --device?"),
        ("damaged: `verify(deep=True)` lists all damage", "damaged: `ezsd cache verify --deep` lists all damage"),
        ("`repair()` mends it", "`ezsd cache repair` mends it"),
        ("run `repair(/a/store)`", "run `ezsd cache repair /a/store`"),
        ("run `repair(/a, b/store)`", "run `ezsd cache repair '/a, b/store'`"),
        ("`repair(/a b/it's, source)` computes", """`ezsd cache repair '/a b/it'"'"'s' --data-root DIR` computes"""),
        ("with `pull(s3://a/b c, DIR)` first", "with `ezsd cache pull 's3://a/b c' DIR` first"),
        ("`push(STORE, s3://a/b;c)` makes one", "`ezsd cache push STORE 's3://a/b;c'` makes one"),
        ("build into another folder: `path=/a b`", "build into another folder: --out '/a b'"),
        ("`repair(/a, source)` computes", "`ezsd cache repair /a --data-root DIR` computes"),
        ("with `pull(s3://a/b, DIR)` first", "with `ezsd cache pull s3://a/b DIR` first"),
        ("`push(STORE, s3://a/b)` makes one", "`ezsd cache push STORE s3://a/b` makes one"),
        ("the same `StoreWriter.open(...)` again", "the same `ezsd cache build` again"),
        ("(`StoreWriter.open(NEW_FOLDER, ...)`), or", "(`ezsd cache build --out NEW_FOLDER`), or"),
        ("choose another folder: `path=NEW`", "choose another folder: --out NEW"),
        ("give the `source` it was made from", "give the --data-root it was made from"),
        ("run with `loss.distillation=0`", "run with --set loss.distillation=0"),
    ],
)
def test_parameters_are_said_as_options(message, said):
    assert as_options(message) == said


@pytest.mark.parametrize(
    "message",
    [
        "run `ezsd cache repair x --data-root DIR`",
        "class '`run`' occurs twice",
        "/a/`run`/b.jpg: no such image",
        "`run`.jpg: no such image",
        "start it with `torchrun`",
        "/a/`repair()`/b: is missing",
        "see `ezsd.losses` and `open_clip.list_models()`",
        "run=3/weights=4.jpg: no such image",
        "found `model.safetensors` beside `eval.json`",
    ],
)
def test_commands_and_what_a_user_has_named_stay(message):
    assert as_options(message) == message


def test_all_settings_are_known():
    tables = to_tables(load_preset("shapes"))
    settings = [f"{section}.{key}" for section, table in tables.items() for key in table]
    assert [as_options(f"`{setting}=1`") for setting in settings] == [f"--set {setting}=1" for setting in settings]
