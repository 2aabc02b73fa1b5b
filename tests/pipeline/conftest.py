"""What every test of the pipeline would make anew."""

import open_clip
import pytest

from ezsd.teacher.requirements import TINY_SHAPES


@pytest.fixture(scope="session", autouse=True)
def _one_tokenizer():
    # It reads 49,000 merges whenever the packaged teacher is loaded: a fourth of the time of a small build.
    made, make = [], open_clip.get_tokenizer

    def get(name="", *args, **options):
        if name != TINY_SHAPES or args or options:
            return make(name, *args, **options)
        if not made:
            made.append(make(name))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", get)
        yield
