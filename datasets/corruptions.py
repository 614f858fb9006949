"""Corruptions of images: those of MedMNIST-C (Di Salvo, Doerrich, Ledig 2024), and four more for chest radiographs.

Every corruption has one ladder of five severities for all datasets, so that severities can be compared between them;
severity 0 is the image itself. The ladders are those of MedMNIST-C (which tunes some of them to every set) on
ChestMNIST, DermaMNIST or PathMNIST, but for what is a length there, and but for the following:

- Lengths are fractions of the shorter side, written in 28ths (pixels at 28), so that 28 and 224 pixels show the same
  picture. MedMNIST-C's blurs, made for 224 pixels, are a half to a pixel long at 28, where they change next to nothing;
  ours are about twice as long. Pixelation leaves as many cells across at any size as it does at 28.
- Noise is per pixel and JPEG works on blocks of 8 pixels, as in a detector and in a file, at any size: both are the
  more severe the fewer pixels an image has.
- Letters are 6 % of the side high, yet at least 5 pixels, so that they can be read.
- `saturate` keeps the luminance, where MedMNIST-C raises the saturation of HSV; blots, bubbles and words number exactly
  what the ladder says, where MedMNIST-C draws up to as many; bubbles become more, not larger as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError, suggest

if TYPE_CHECKING:
    from torch import Tensor

SEVERITIES = 5
CHUNK_NUMBERS = 2**20
"""Numbers of images that are corrupted at a time."""

MICROSCOPY, RADIOGRAPHS = "microscopy", "radiographs"


@dataclass(frozen=True)
class Corruption:
    """What a corruption is and which images can have it.

    kernel: its function in `corruption_kernels`; levels: that function's parameter at severities 1 to 5; modality:
    the images it is for, "" = all; colour: whether it needs three channels; smallest: pixels of the shorter side.
    """

    name: str
    summary: str
    kernel: str
    levels: tuple[float, float, float, float, float]
    modality: str = ""
    colour: bool = False
    smallest: int = 8


CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption("pixelate", "cells of one value; cells across the image", "pixelate", (22, 18, 14, 10, 7)),
        Corruption("jpeg", "JPEG compression; quality", "jpeg", (50, 30, 15, 10, 7)),
        Corruption(
            "gaussian_noise",
            "additive normal noise; standard deviation, of the range",
            "gaussian_noise",
            (0.04, 0.08, 0.12, 0.18, 0.26),
        ),
        Corruption(
            "speckle_noise",
            "multiplicative normal noise; standard deviation",
            "speckle_noise",
            (0.05, 0.15, 0.2, 0.35, 0.45),
        ),
        Corruption(
            "impulse_noise", "black and white pixels; share of them", "impulse_noise", (0.01, 0.03, 0.06, 0.09, 0.17)
        ),
        Corruption("shot_noise", "Poisson noise; photons of a white pixel", "shot_noise", (60, 25, 18, 10, 5)),
        Corruption("defocus_blur", "out of focus; radius of the disk", "defocus_blur", (0.8, 1.1, 1.4, 1.8, 2.2)),
        Corruption("gaussian_blur", "Gaussian blur; standard deviation", "gaussian_blur", (0.4, 0.6, 0.8, 1.0, 1.3)),
        Corruption("motion_blur", "motion along a line; its length", "motion_blur", (2, 2.5, 3, 4, 5)),
        Corruption("zoom_blur", "zoom while exposing; magnification", "zoom_blur", (1.11, 1.16, 1.21, 1.26, 1.31)),
        Corruption("brightness_up", "brighter; factor", "brightness", (1.1, 1.2, 1.3, 1.4, 1.5)),
        Corruption("brightness_down", "darker; factor", "brightness", (0.9, 0.8, 0.7, 0.6, 0.5)),
        Corruption("contrast_up", "more contrast; factor", "contrast", (1.1, 1.2, 1.3, 1.4, 1.6)),
        Corruption("contrast_down", "less contrast; factor", "contrast", (0.9, 0.8, 0.7, 0.6, 0.4)),
        Corruption("gamma_up", "gamma correction, darker; exponent", "gamma", (1.1, 1.2, 1.3, 1.4, 1.6)),
        Corruption("gamma_down", "gamma correction, brighter; exponent", "gamma", (0.9, 0.8, 0.7, 0.6, 0.4)),
        Corruption("saturate", "stronger colours; factor", "saturate", (1.15, 1.3, 1.5, 1.75, 2.0), colour=True),
        Corruption(
            "stain_deposit", "blots of stain; number", "stain_deposit", (1, 2, 3, 4, 5), MICROSCOPY, colour=True
        ),
        Corruption("bubble", "air bubbles under the glass; number", "bubble", (5, 10, 15, 20, 25), MICROSCOPY),
        Corruption(
            "black_corner",
            "black outside a circle; radius, of half a side",
            "black_corner",
            (1.1, 1.05, 1.0, 0.95, 0.9),
        ),
        Corruption("characters", "words over the image; number", "characters", (1, 2, 3, 4, 6), smallest=28),
        Corruption("exposure", "over- or underexposed; stops", "exposure", (0.5, 1.0, 1.5, 2.0, 2.5), RADIOGRAPHS),
        Corruption("rotation", "patient turned, either way; degrees", "rotation", (3, 6, 9, 12, 15)),
        Corruption(
            "collimation",
            "black shutters on all sides; widest one",
            "collimation",
            (1.0, 2.0, 3.0, 4.0, 5.0),
            RADIOGRAPHS,
        ),
        Corruption(
            "text_marker",
            "burnt-in markers at the border; number",
            "text_marker",
            (1, 2, 3, 4, 5),
            RADIOGRAPHS,
            smallest=28,
        ),
    )
}

_DIGITAL = ("pixelate", "jpeg")
_NOISES = ("gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise")
_BRIGHTNESS = ("brightness_up", "brightness_down")
_CONTRAST = ("contrast_up", "contrast_down")
_GAMMA = ("gamma_up", "gamma_down")
_SLIDES = (*_DIGITAL, "defocus_blur", "motion_blur", *_BRIGHTNESS, *_CONTRAST, "saturate", "stain_deposit", "bubble")
_GREY = (*_DIGITAL, *_NOISES, "gaussian_blur", *_BRIGHTNESS, *_CONTRAST, *_GAMMA)  # chest, pneumonia, organs
_CHEST = (*_GREY, "exposure", "rotation", "collimation", "text_marker")
_DERMATOSCOPY = (*_DIGITAL, *_NOISES, "defocus_blur", "motion_blur", "zoom_blur", *_BRIGHTNESS, *_CONTRAST)

DECLARED: dict[str, tuple[str, ...]] = {
    "pathmnist": _SLIDES,
    "bloodmnist": _SLIDES,
    "dermamnist": (*_DERMATOSCOPY, "black_corner", "characters"),
    "retinamnist": (
        *_DIGITAL,
        "gaussian_noise",
        "speckle_noise",
        "defocus_blur",
        "motion_blur",
        "brightness_down",
        "contrast_down",
    ),
    "tissuemnist": (*_DIGITAL, "impulse_noise", "gaussian_blur", *_BRIGHTNESS, *_CONTRAST),
    "octmnist": (*_DIGITAL, "speckle_noise", "defocus_blur", "motion_blur", "contrast_down"),
    "breastmnist": (*_DIGITAL, "speckle_noise", "motion_blur", *_BRIGHTNESS, "contrast_down"),
    "chestmnist": _GREY,
    "pneumoniamnist": _GREY,
    "organamnist": _GREY,
    "organcmnist": _GREY,
    "organsmnist": _GREY,
    **dict.fromkeys(("nih_chest_xray14", "chexpert", "mimic_cxr", "csv", "phantom_cxr"), _CHEST),
}
"""The corruptions of a dataset: MedMNIST-C's list for its sets, that of ChestMNIST and four more for radiographs."""

MODALITIES: dict[str, str] = {
    "pathmnist": MICROSCOPY,
    "bloodmnist": MICROSCOPY,
    "tissuemnist": MICROSCOPY,
    "dermamnist": "dermatoscopy",
    "retinamnist": "photographs of the retina",
    "octmnist": "optical coherence tomography",
    "breastmnist": "ultrasound",
    "organamnist": "computed tomography",
    "organcmnist": "computed tomography",
    "organsmnist": "computed tomography",
    **dict.fromkeys(
        ("chestmnist", "pneumoniamnist", "nih_chest_xray14", "chexpert", "mimic_cxr", "csv", "phantom_cxr"), RADIOGRAPHS
    ),
}
"""What the images of a dataset are; of those that are not here nothing is known."""


def corruption_of(name: str) -> Corruption:
    """Return the corruption `name`; UserError, with close names, for an unknown one."""
    if name not in CORRUPTIONS:
        raise UserError(f"there is no corruption '{name}': {suggest(name, CORRUPTIONS)}")
    return CORRUPTIONS[name]


def corruptions_of(dataset_name: str, channels: int) -> list[str]:
    """Return the corruptions declared for a dataset, in order: of one that nothing is declared for, those for all."""
    declared = DECLARED.get(dataset_name) or tuple(name for name, c in CORRUPTIONS.items() if not c.modality)
    return [name for name in declared if channels == 3 or not CORRUPTIONS[name].colour]


def cannot(name: str, dataset_name: str, channels: int, size: int) -> str:
    """Return why images of `dataset_name` with so many channels, and `size` pixels to the shorter side, cannot have it.

    "" where they can, whether or not it is declared for them. Raises UserError for an unknown corruption.
    """
    corruption = corruption_of(name)
    modality = MODALITIES.get(dataset_name, "")
    if modality and corruption.modality and modality != corruption.modality:
        return f"{name} is for {corruption.modality}, and the images of {dataset_name} are {modality}"
    if corruption.colour and channels != 3:
        return f"{name} needs colours, 3 channels, and these images have {channels}"
    if size < corruption.smallest:
        return f"{name} needs at least {corruption.smallest} pixels to a side, and these images have {size}"
    return ""


def corrupt(images: Tensor, name: str, severity: int, seed: int, first: int = 0) -> Tensor:
    """Return the images with corruption `name` at `severity` 0 (as they are) to 5: uint8, on the same device.

    images: uint8 [sample, channel, height, width], of which the first is number `first` of its part. The randomness of
    image i depends on (seed, name, first + i) alone, neither on the batch nor on the severity: a higher one shows the
    same noise, direction or places, stronger, wider or more of them. It is drawn on the CPU; devices agree but for
    single grey levels where a rounding error decides.

    Raises UserError for an unknown name, another severity, and images that cannot have it.
    """
    import torch

    from .corruption_kernels import KERNELS, Draws, rounded

    corruption = corruption_of(name)
    if severity not in range(SEVERITIES + 1):
        raise UserError(f"severity {severity} of {name} is not there: give 0 (none) to {SEVERITIES}")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}: give uint8 [sample, channel, height, width]"
        )
    if reason := cannot(name, "", images.shape[1], min(images.shape[2:])):
        raise UserError(f"{reason}: leave it out")
    if severity == 0:
        return images.clone()
    kernel, level = KERNELS[corruption.kernel], corruption.levels[severity - 1]
    result = torch.empty_like(images)
    step = max(1, CHUNK_NUMBERS // max(1, images[:1].numel()))
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        draws = Draws(seed, name, np.arange(first + start, first + start + len(chunk)), images.device)
        result[start : start + step] = rounded(kernel(chunk.float(), level, draws)).clamp_(0, 255)
    return result
