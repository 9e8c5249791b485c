"""The order of images: what every epoch and every step may rely on."""

import numpy as np
import pytest

from trainer.sampler import Sampler

CASES = {
    "one window, batch divides": Sampler((16, 16, 8), 8, 1000, 0),
    "one window, batch does not divide": Sampler((16, 16, 5), 8, 1000, 1),
    "barely more images than a batch": Sampler((4, 5), 8, 1000, 2),
    "as many images as a batch": Sampler((4, 4), 8, 1000, 3),
    "many windows": Sampler((16,) * 20 + (7,), 12, 48, 4),
    "a step in three windows": Sampler((3,) * 40, 50, 1, 5),
}


def steps(order: Sampler, first: int, count: int, host: int = 0, hosts: int = 1) -> list[list[int]]:
    """Returns the places of `count` steps from `first` on, those of one host."""
    stream: list[int] = []
    size = order.batch_size // hosts
    for window in order.windows(first, host, hosts).as_numpy_iterator():
        stream.extend(window["positions"])
        if len(stream) >= count * size:
            break
    return [stream[i * size : (i + 1) * size] for i in range(count)]


@pytest.mark.parametrize("order", CASES.values(), ids=CASES.keys())
def test_every_epoch_covers_every_image_once_and_no_step_has_one_twice(order):
    epochs = 7
    count = order.num_images * epochs // order.batch_size
    taken = steps(order, 0, count + 1)
    assert all(len(set(step)) == order.batch_size for step in taken)
    stream = [place for step in taken for place in step]
    for epoch in range(epochs):
        assert sorted(stream[epoch * order.num_images : (epoch + 1) * order.num_images]) == list(range(order.num_images))


@pytest.mark.parametrize("order", CASES.values(), ids=CASES.keys())
def test_a_step_is_the_same_wherever_one_starts(order):
    taken = steps(order, 0, 40)
    for first in (1, 7, 23, 38):
        assert steps(order, first, 2) == taken[first : first + 2]


def test_epochs_and_seeds_differ_and_windows_mix_the_whole_set():
    order = CASES["many windows"]
    epochs = [
        [place for step in steps(order, 0, 100) for place in step][i * order.num_images :][: order.num_images] for i in range(2)
    ]
    assert epochs[0] != epochs[1]
    other = Sampler(order.block_sizes, order.batch_size, order.window_size, seed=99)
    assert steps(other, 0, 1) != steps(order, 0, 1)
    first_window = next(order.windows(0).as_numpy_iterator())
    assert np.ptp(first_window["blocks"]) > len(first_window["blocks"])


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="7 images do not fill one batch of 8"):
        Sampler((7,), 8, 100, 0)


def test_windows_stay_small():
    order = Sampler((64,) * 200, 32, 640, 0)
    assert max(len(window["indices"]) for window in order.windows(0).take(40).as_numpy_iterator()) <= 2 * 640


def test_a_window_says_where_in_its_blocks_its_places_are():
    order = Sampler((16,) * 10 + (5,), 12, 48, 0)
    starts = np.arange(11) * 16
    for window in order.windows(3, 1, 2).take(8).as_numpy_iterator():
        read = np.concatenate([starts[block] + np.arange(order.block_sizes[block]) for block in window["blocks"]])
        np.testing.assert_array_equal(read[window["indices"]], window["positions"])


HOSTS = {
    "whole blocks": Sampler((64,) * 60, 32, 640, 0),
    "short blocks among them": Sampler((64,) * 30 + (11,) * 3, 48, 512, 1),
    "few images": Sampler((16, 16, 8), 8, 1000, 2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("order", HOSTS.values(), ids=HOSTS.keys())
def test_hosts_together_feed_every_image_once_an_epoch_and_no_step_has_one_twice(order, hosts):
    count = 3 * order.num_images // order.batch_size + 1
    parts = [steps(order, 0, count, host, hosts) for host in range(hosts)]
    taken = [[place for part in parts for place in part[step]] for step in range(count)]
    assert all(len(set(step)) == order.batch_size for step in taken)
    stream = [place for step in taken for place in step]
    for epoch in range(3):
        assert sorted(stream[epoch * order.num_images : (epoch + 1) * order.num_images]) == list(range(order.num_images))
    assert steps(order, 11, 2, 1, hosts) == parts[1][11:13]


@pytest.mark.thorough
def test_a_host_reads_little_more_than_its_part():
    order = Sampler((64,) * 640, 256, 8192, 0)
    for host in range(4):
        blocks = 0
        for window in order.windows(0, host, 4).take(order.windows_per_epoch).as_numpy_iterator():
            blocks += len(window["blocks"])
        assert blocks < 1.1 * 640 / 4


def test_the_plan_needs_no_python_where_it_runs():
    """A TPU slice's hosts make the plan themselves; Python is only where the program was started."""
    graph = HOSTS["whole blocks"].windows(5)._as_serialized_graph().numpy()
    assert b"ScanDataset" in graph
    assert b"PyFunc" not in graph
