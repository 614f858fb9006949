"""Augmentation against padding, cutting and mirroring by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multiplicity_bench.benchmark.augment import changed, draw_changes
from multiplicity_bench.benchmark.networks import Network
from multiplicity_bench.benchmark.train import Training, train
from multiplicity_bench.generators.api import Part


def by_hand(image: np.ndarray, down: int, right: int, mirrored: int) -> np.ndarray:
    """Mirror, pad with black by 20 pixels and cut out the original size."""
    image = image[:, :, ::-1] if mirrored else image
    padded = np.pad(image, ((0, 0), (20, 20), (20, 20)))
    top, left = 20 - down, 20 - right
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 5, 5)])
def test_images_are_mirrored_and_shifted(shape):
    images = torch.randint(1, 256, (40, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    changes = torch.cat(
        [torch.randint(-6, 7, (40, 2), generator=generator), torch.randint(2, (40, 1), generator=generator)], 1
    )
    found = changed(images, changes)
    assert found.dtype == torch.uint8 and found.shape == images.shape
    for image, change, own in zip(images.numpy(), changes.tolist(), found.numpy(), strict=True):
        assert np.array_equal(own, by_hand(image, *change))


def test_changes_are_uniform_and_anew_in_every_epoch():
    drawn = torch.stack([draw_changes("shift_flip", 3, epoch, 400, 28) for epoch in range(20)])
    for axis, values in enumerate((range(-2, 3), range(-2, 3), range(2))):
        counts = np.array([(drawn[..., axis] == v).sum().item() for v in values])
        assert counts.sum() == 8000
        # binomial: five standard deviations
        assert np.all(np.abs(counts - 8000 / len(counts)) < 5 * np.sqrt(8000 / len(counts)))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], draw_changes("shift_flip", 3, 2, 400, 28))
    assert not draw_changes("shift", 3, 0, 400, 28)[:, 2].any()
    assert draw_changes("none", 3, 0, 400, 28) is None


def test_a_training_sees_the_changed_images_of_its_seed():
    generator = torch.Generator().manual_seed(0)
    data = Part(torch.randint(0, 256, (24, 1, 14, 14), generator=generator, dtype=torch.uint8), torch.arange(24) % 2)
    network, seed = Network({"name": "mlp", "width": 4}, 1, 14, 2), 5
    augmented = train(network, data, Training(epochs=1, batch_size=8, augment="shift_flip"), seed)
    moved = Part(changed(data.images, draw_changes("shift_flip", seed, 0, 24, 14)), data.labels)
    by_hand = train(network, moved, Training(epochs=1, batch_size=8), seed)
    plain = train(network, data, Training(epochs=1, batch_size=8), seed)
    for name, leaf in augmented.params.items():
        assert torch.equal(leaf, by_hand.params[name])
    assert not torch.equal(augmented.params["body.1.weight"], plain.params["body.1.weight"])
