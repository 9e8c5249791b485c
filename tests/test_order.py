"""The order of images: what every epoch and every step may rely on."""

from itertools import islice

import numpy as np
import pytest

from trainer.order import Order

CASES = {
    "one window, batch divides": Order((16, 16, 8), 8, 1000, 0),
    "one window, batch does not divide": Order((16, 16, 5), 8, 1000, 1),
    "barely more images than a batch": Order((4, 5), 8, 1000, 2),
    "as many images as a batch": Order((4, 4), 8, 1000, 3),
    "many windows": Order((16,) * 20 + (7,), 12, 48, 4),
    "a step in three windows": Order((3,) * 40, 50, 1, 5),
}


def steps(order: Order, first: int, count: int) -> list[list[int]]:
    """Returns the places of `count` steps from `first` on."""
    stream = []
    for window in order.windows(first):
        stream.extend(order._places(window.blocks)[window.order][window.skip :])
        if len(stream) >= count * order.batch_size:
            break
    return [stream[i * order.batch_size : (i + 1) * order.batch_size] for i in range(count)]


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
    other = Order(order.block_sizes, order.batch_size, order.window_size, seed=99)
    assert steps(other, 0, 1) != steps(order, 0, 1)
    first_window = next(iter(order.windows(0)))
    assert np.ptp(first_window.blocks) > len(first_window.blocks)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="7 images do not fill one batch of 8"):
        Order((7,), 8, 100, 0)


def test_windows_stay_small():
    order = Order((64,) * 200, 32, 640, 0)
    assert max(len(window.order) for window in islice(order.windows(0), 40)) <= 2 * 640
