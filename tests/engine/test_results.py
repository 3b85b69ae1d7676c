import multiprocessing
import queue

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_adapt.engine import results
from megatron_adapt.engine.results import ResultFile


def test_a_forked_process_leaves_what_no_pipe_holds():
    file, value = ResultFile(), {0: ["x" * 99] * 99_999}
    writer = multiprocessing.get_context("fork").Process(target=file.put, args=(value,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert file.get_nowait() == value


def test_a_writer_that_died_left_nothing():
    with pytest.raises(queue.Empty):
        ResultFile().get_nowait()


def test_every_save_has_a_file_of_its_own():
    results.install()
    first, second = (filesystem_async._get_write_results_queue() for _ in range(2))
    first.put(1)
    with pytest.raises(queue.Empty):
        second.get_nowait()
    assert first.get_nowait() == 1
