"""The committed reference: its records are those that the code of today would look for."""

from pathlib import Path

import pytest

from suite import experiments, zoo
from suite.report import data, tables
from suite.store import Store

REFERENCE = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def tests():
    return experiments.Tasks(experiments.EMBEDDED_TASKS)


@pytest.mark.parametrize("name", zoo.names())
def test_the_main_table_is_found_whole(name, tests):
    """A change of an option, of a task, of a model or of the identity itself orphans the records: measure them anew."""
    planned = experiments.plan(name, store=Store(REFERENCE), tests=tests)
    assert planned.outcome.found > 40 and planned.jobs == [], [job.variant.label for job in planned.jobs]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in REFERENCE.glob("*/records")))
def test_committed_tables_are_what_the_records_say(folder):
    store = Store(REFERENCE)
    model = next(name for name in store.models() if store.folder(name).name == folder)
    drawn = {setting.stem: tables.markdown(data.compare(store, setting)) for setting in data.settings(store, model)}
    for file in (REFERENCE / folder).glob("W*.md"):
        assert file.read_text() == drawn[file.stem]
