"""Every fault of the list has a test that is there, and the document says which."""

import ast

import pytest

from tests.faults.registry import BEGIN, END, FAULTS, ROOT, table


def test_every_number_is_there():
    assert list(FAULTS) == [f"R{number}" for number in range(1, 27)]


@pytest.mark.parametrize("number", FAULTS)
def test_the_tests_of_a_fault_are_there(number):
    assert FAULTS[number].tests
    for test in FAULTS[number].tests:
        file, _, name = test.partition("::")
        assert name in defined(ROOT / "tests" / file), test


def defined(file):
    """Names of the tests of a file."""
    body = ast.parse(file.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    # A state machine's test is assigned.
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_document_has_the_table():
    found = (ROOT / "docs/faults.md").read_text().partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == table(), "write it anew with `python -m tests.faults.registry`"
