"""The simulated driver refuses what a real one would refuse or spoil: each fault is seeded here, and each is let pass
by a driver without the check that finds it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dydit.errors import BackendError
from tests.fixtures.driver_faults import Check, Fault
from tests.fixtures.fake_driver import FakeDriver

SIZE = 1024


@pytest.fixture
def drivers():
    """In the place of the fixture of the same name, which fails a test for every fault."""


class Scene:
    """A driver with its context current, two streams, an event, memory that holds zeros, and pinned memory."""

    def __init__(self, **settings):
        self.driver = FakeDriver(**settings)
        self.driver.push()
        self.compute, self.other = self.driver.make_stream(), self.driver.make_stream()
        self.event = self.driver.make_event()
        self.a, self.b = (self.driver.allocate(SIZE) for _ in range(2))
        for address in (self.a, self.b):
            self.driver.clear(address, SIZE, self.compute)
        self.pinned = self.driver.allocate_host(SIZE)
        self.pinned[:] = 7
        self.driver.synchronize_stream(self.compute)

    def captured(self, *work):
        """A graph of some work."""
        self.driver.begin_capture(self.compute)
        for each in work:
            each()
        return self.driver.end_capture(self.compute)

    def copy(self, stream=None):
        self.driver.copy(self.b, self.a, SIZE, stream or self.compute)


def context_of_another_thread(scene):
    failed = []

    def work():
        try:
            scene.copy()
        except Fault as fault:
            failed.append(fault)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def context_that_was_popped(scene):
    scene.driver.pop()
    scene.driver.allocate(SIZE)


def copy_past_the_end(scene):
    scene.driver.copy(scene.b, scene.a + 1, SIZE, scene.compute)


def use_after_free(scene):
    scene.driver.free(scene.a)
    scene.copy()


def double_free(scene):
    scene.driver.free(scene.a)
    scene.driver.free(scene.a)


def free_of_an_address_inside(scene):
    scene.driver.free(scene.a + 256)


def free_while_a_copy_is_queued(scene):
    scene.copy()
    scene.driver.free(scene.a)


def free_after_a_wait_for_another_stream(scene):
    scene.copy()
    scene.driver.synchronize_stream(scene.other)
    scene.driver.free(scene.a)


def pinned_memory_freed_while_its_copy_is_queued(scene):
    scene.driver.upload(scene.a, scene.pinned, scene.compute)
    scene.driver.free_host(scene.pinned)


def read_of_what_another_stream_writes(scene):
    scene.driver.upload(scene.a, scene.pinned, scene.other)
    scene.copy()


def write_of_what_another_stream_reads(scene):
    scene.copy()
    scene.driver.upload(scene.a, scene.pinned, scene.other)


def two_writers(scene):
    scene.driver.clear(scene.a, SIZE, scene.compute)
    scene.driver.clear(scene.a, SIZE, scene.other)


def wait_for_an_event_that_came_too_early(scene):
    scene.driver.record(scene.event, scene.other)
    scene.driver.upload(scene.a, scene.pinned, scene.other)
    scene.driver.wait(scene.compute, scene.event)
    scene.copy()


def download_into_memory_that_another_stream_uploads(scene):
    scene.driver.upload(scene.a, scene.pinned, scene.other)
    scene.driver.download(scene.pinned, scene.b, scene.compute)


def graph_that_reads_what_another_stream_writes(scene):
    graph = scene.captured(scene.copy)
    scene.driver.upload(scene.a, scene.pinned, scene.other)
    scene.driver.launch_graph(graph, scene.compute)


def kernel_that_reads_garbage(scene):
    fresh = scene.driver.allocate(SIZE)
    scene.driver.launch(scene.compute, "kernel", [(fresh, SIZE)], [], lambda: [])
    scene.driver.synchronize_stream(scene.compute)


def kernel_that_reads_what_another_used_as_scratch(scene):
    scene.driver.launch(scene.compute, "one", [], [], lambda: [], (scene.a, SIZE))
    scene.driver.launch(scene.compute, "two", [(scene.a, SIZE)], [], lambda: [])
    scene.driver.synchronize_stream(scene.compute)


def pageable_upload_in_a_capture(scene):
    scene.captured(lambda: scene.driver.upload(scene.a, np.zeros(SIZE, np.uint8), scene.compute))


def pageable_download_in_a_capture(scene):
    scene.captured(lambda: scene.driver.download(np.zeros(SIZE, np.uint8), scene.a, scene.compute))


def allocation_in_a_capture(scene):
    scene.captured(lambda: scene.driver.allocate(SIZE))


def free_in_a_capture(scene):
    scene.captured(lambda: scene.driver.free(scene.b))


def wait_in_a_capture(scene):
    scene.driver.record(scene.event, scene.other)
    scene.captured(lambda: scene.driver.wait(scene.compute, scene.event))


def synchronisation_of_a_captured_stream(scene):
    scene.captured(lambda: scene.driver.synchronize_stream(scene.compute))


def synchronisation_of_an_event_in_a_capture(scene):
    scene.driver.record(scene.event, scene.compute)
    scene.captured(lambda: scene.driver.synchronize(scene.event))


def wait_for_an_event_that_was_never_recorded(scene):
    scene.driver.wait(scene.compute, scene.event)


def graph_after_its_end(scene):
    graph = scene.captured(scene.copy)
    scene.driver.destroy_graph(graph)
    scene.driver.launch_graph(graph, scene.compute)


def graph_destroyed_while_it_runs(scene):
    graph = scene.captured(scene.copy)
    scene.driver.launch_graph(graph, scene.compute)
    scene.driver.destroy_graph(graph)


def memory_freed_under_a_graph(scene):
    graph = scene.captured(scene.copy)
    scene.driver.free(scene.a)
    scene.driver.launch_graph(graph, scene.compute)


def address_changed_under_a_graph(scene):
    graph = scene.captured(scene.copy)
    scene.driver.free(scene.a)
    scene.a = scene.driver.allocate(SIZE)
    scene.driver.clear(scene.a, SIZE, scene.compute)
    scene.driver.launch_graph(graph, scene.compute)


def leak(scene):
    scene.driver.close()


FAULTS = {
    context_of_another_thread: Check.CONTEXT,
    context_that_was_popped: Check.CONTEXT,
    copy_past_the_end: Check.RANGE,
    use_after_free: Check.FREED,
    double_free: Check.DOUBLE_FREE,
    free_of_an_address_inside: Check.DOUBLE_FREE,
    free_while_a_copy_is_queued: Check.BUSY,
    free_after_a_wait_for_another_stream: Check.BUSY,
    pinned_memory_freed_while_its_copy_is_queued: Check.BUSY,
    graph_destroyed_while_it_runs: Check.BUSY,
    read_of_what_another_stream_writes: Check.ORDER,
    write_of_what_another_stream_reads: Check.ORDER,
    two_writers: Check.ORDER,
    wait_for_an_event_that_came_too_early: Check.ORDER,
    download_into_memory_that_another_stream_uploads: Check.ORDER,
    graph_that_reads_what_another_stream_writes: Check.ORDER,
    kernel_that_reads_garbage: Check.UNWRITTEN,
    kernel_that_reads_what_another_used_as_scratch: Check.UNWRITTEN,
    pageable_upload_in_a_capture: Check.PAGEABLE,
    pageable_download_in_a_capture: Check.PAGEABLE,
    allocation_in_a_capture: Check.CAPTURE,
    free_in_a_capture: Check.CAPTURE,
    wait_in_a_capture: Check.CAPTURE,
    synchronisation_of_a_captured_stream: Check.CAPTURE_SYNC,
    synchronisation_of_an_event_in_a_capture: Check.CAPTURE_SYNC,
    wait_for_an_event_that_was_never_recorded: Check.UNRECORDED,
    graph_after_its_end: Check.GRAPH,
    memory_freed_under_a_graph: Check.GRAPH_MEMORY,
    address_changed_under_a_graph: Check.GRAPH_MEMORY,
    leak: Check.LEAK,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_refused_by_its_check_alone(fault):
    scene = Scene()
    with pytest.raises(Fault) as caught:
        fault(scene)
    assert caught.value.check is FAULTS[fault] and scene.driver.faults == [caught.value]
    scene = Scene(without=[FAULTS[fault]])
    fault(scene)
    assert not scene.driver.faults, "no other check finds it"


def test_every_check_has_its_fault():
    assert set(FAULTS.values()) == set(Check)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_in_order_is_done(seed):
    """An event, a wait of the host, other bytes of the same memory: none of these is a fault, in any order."""
    scene = Scene(seed=seed)
    driver = scene.driver
    driver.upload(scene.a, scene.pinned, scene.other)
    driver.record(scene.event, scene.other)
    driver.wait(scene.compute, scene.event)
    scene.copy()
    driver.synchronize_stream(scene.compute)
    assert (driver.contents(scene.b, SIZE) == 7).all()
    driver.clear(scene.b, SIZE, scene.other)  # the host knows that the copy has run
    driver.clear(scene.a, SIZE // 2, scene.compute)
    driver.upload(scene.a + SIZE // 2, scene.pinned[: SIZE // 2], scene.other)
    graph = scene.captured(lambda: driver.clear(scene.a, 256, scene.compute))
    driver.launch_graph(graph, scene.compute)
    for stream in (scene.compute, scene.other):
        driver.synchronize_stream(stream)
        assert driver.has_run(stream)
    assert driver.contents(scene.a, SIZE).sum() == 7 * SIZE // 2 and not driver.contents(scene.b, SIZE).any()
    driver.destroy_graph(graph)
    for address in (scene.a, scene.b):
        driver.free(address)
    driver.free_host(scene.pinned)
    driver.destroy_event(scene.event)
    for stream in (scene.compute, scene.other):
        driver.destroy_stream(stream)
    driver.pop()
    driver.close()


def test_without_the_wait_the_results_are_wrong_in_some_order():
    """So that a missing wait would be seen even if the check of the order were wrong."""
    seen = set()
    for seed in range(20):
        scene = Scene(seed=seed, without=[Check.ORDER])
        scene.driver.upload(scene.a, scene.pinned, scene.other)
        scene.copy()
        scene.driver.synchronize_stream(scene.compute)
        seen.add(int(scene.driver.contents(scene.b, SIZE)[0]))
    assert seen == {0, 7}


def test_work_waits_for_the_host_and_pinned_memory_is_read_when_it_runs():
    scene = Scene()
    scene.driver.upload(scene.a, scene.pinned, scene.compute)
    scene.driver.record(scene.event, scene.compute)
    assert not scene.driver.query(scene.event)
    scene.pinned[:] = 9  # too early: this is what a ring must not do
    scene.driver.synchronize(scene.event)
    assert scene.driver.query(scene.event) and (scene.driver.contents(scene.a, SIZE) == 9).all()


def test_pageable_memory_is_copied_at_once_and_counted():
    scene, data = Scene(), np.full(SIZE, 3, np.uint8)
    scene.driver.upload(scene.a, data, scene.compute)
    data[:] = 4
    scene.driver.download(data, scene.a, scene.compute)
    assert (data == 3).all() and scene.driver.pageable == 2


def test_memory_is_limited():
    driver = FakeDriver(limit=1000)
    driver.push()
    driver.allocate(600)
    with pytest.raises(BackendError, match="out of device memory"):
        driver.allocate(600)
