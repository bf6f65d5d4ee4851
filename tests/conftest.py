"""How the suite runs: whole, in parallel, one thread a process; chosen tests, in the process that was started."""

import os
from pathlib import Path

import pytest

# Before torch loads, here and in the processes that tests start: the workers share the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What ``-n auto`` means: up to four workers (about 1.2 GB each) for the whole suite; none where files or tests
    were named, as starting workers costs more than it saves."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(4, (os.cpu_count() or 1) + 1)  # some tests wait


@pytest.fixture(scope="session")
def warm_python():
    """A program ``python`` that has the slow libraries loaded: see ``warm``. One of each worker."""
    import tempfile

    import warm

    with tempfile.TemporaryDirectory() as directory, warm.start(Path(directory)) as program:  # a socket's path is short
        yield program
