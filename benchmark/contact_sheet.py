"""A picture of the corruptions of a dataset, to be looked at: a row for each, its severities 0 to 5 from left to right.

python -m multiplicity_bench.benchmark.contact_sheet breastmnist sheet.png --data-root DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..datasets.api import DATASETS, prepare
from ..datasets.corruptions import SEVERITIES, corrupt, corruptions_of
from ..errors import UserError
from ..leaderboard.cli import Parser, execute

if TYPE_CHECKING:
    from PIL import Image

CELL = 112
"""Pixels of a cell, which images are enlarged to by a whole factor."""

LABEL, HEADER, GAP = 120, 18, 4


def contact_sheet(images: np.ndarray, names: list[str], seed: int = 0) -> Image.Image:
    """Return the sheet: row r is image r of `images`, uint8 [row, channel, height, width], with corruption names[r]."""
    import torch
    from PIL import Image, ImageDraw

    factor = max(1, CELL // images.shape[-1])
    height, width = (factor * side + GAP for side in images.shape[2:])
    sheet = Image.new("RGB", (LABEL + (SEVERITIES + 1) * width, HEADER + len(names) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for severity in range(SEVERITIES + 1):
        draw.text((LABEL + severity * width, 3), f"severity {severity}", fill="black")
    for row, name in enumerate(names):
        top = HEADER + row * height
        draw.text((4, top + height // 2 - 8), name, fill="black")
        for severity in range(SEVERITIES + 1):
            shown = corrupt(torch.from_numpy(images[row : row + 1]), name, severity, seed, first=row)[0]
            pixels = shown.expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
            sheet.paste(Image.fromarray(pixels), (LABEL + severity * width, top))
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Write the sheet of a dataset."""
    parser = Parser(prog="contact_sheet", description="Draw every corruption of a dataset at every severity.")
    parser.add_argument("dataset", help="name of a dataset, with its default settings")
    parser.add_argument("out", type=Path, metavar="FILE", help="the picture: .png, .jpg")
    parser.add_argument("--data-root", metavar="DIR", help="as data_root of run-benchmark")
    parser.set_defaults(run=_run)
    return execute(parser, argv)


def _run(args: argparse.Namespace) -> int:
    dataset = DATASETS.get(args.dataset)()
    dataset.name = args.dataset
    images = prepare(dataset, args.data_root).splits["test"].pixels
    names = corruptions_of(args.dataset, images.shape[1])
    sheet = contact_sheet(images[np.arange(len(names)) % len(images)], names)
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.out} cannot be written ({error}): name a .png in a folder that is there") from None
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
