"""The mutants of ``make mutants`` fit the code: each change can be applied, and its tests exist."""

import pytest

from tests.mutants import MUTANTS, ROOT, applied


def test_there_are_twenty():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_the_code_and_has_tests(mutant):
    text = (ROOT / "resist_lightning" / mutant.file).read_text()
    changed = applied(text, mutant)
    assert changed != text
    compile(changed, mutant.file, "exec")
    assert all((ROOT / test).is_file() for test in mutant.tests)
