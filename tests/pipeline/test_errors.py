"""Errors of the system as the user is told them."""

import errno
import os

import pytest

from ezsd.pipeline.errors import is_of_a_place, with_cure


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_mode_is_to_be_changed_only_where_there_is_a_file(number):
    said = os.strerror(number)
    assert with_cure(OSError(number, said, "/a/file")).startswith(f"/a/file: {said}; have its mode changed")
    # A socket's.
    assert is_of_a_place(OSError(number, said))
    assert with_cure(OSError(number, said)) == f"[Errno {number}] {said}"
