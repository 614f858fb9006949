"""Pixels of the synthetic chest radiographs: random streams by hash, and anatomy as sums of attenuations.

Only +, -, *, /, sqrt, floor, comparisons and integers are used on pixels: these are exactly rounded everywhere, so an
image is the same bytes on every machine (exp and sin differ in the last bit between processors). Coordinates run from
-1 to 1, x to the right of the picture (the patient's left), y downwards; attenuation 0 is black and 1 is white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..identity import derive_seed
from .hashing import scattered

CHUNK_PIXELS = 100_000  # one float32 image plane of a chunk stays in the second-level cache

Pixels = Any  # float32 [sample, height, width], or what broadcasts to it


@dataclass(frozen=True)
class Stream:
    """Random numbers of one split: a function of (seed, split, name, index), whatever else is drawn."""

    seed: int
    split: str

    def bits(self, name: str, index: np.ndarray) -> np.ndarray:
        """Return 64 random bits for every index."""
        return scattered(derive_seed("phantom_cxr", self.seed, self.split, name), index)

    def uniform(self, name: str, index: np.ndarray) -> np.ndarray:
        """Return numbers in [0, 1) as float64."""
        return (self.bits(name, index) >> np.uint64(11)) * 2.0**-53


def render(
    latents: dict[str, np.ndarray], size: int, stream: Stream, visibility: float = 1.0, grain: float = 1.0
) -> np.ndarray:
    """Return the images of `latents`, uint8 [sample, 1, size, size]; row i is image i of the stream's split."""
    count = len(latents["patient"])
    images = np.empty((count, 1, size, size), np.uint8)
    step = max(1, CHUNK_PIXELS // (size * size))
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        film = Film({k: v[rows] for k, v in latents.items()}, rows, size, stream)
        images[rows, 0] = film.develop(visibility, grain)
    return images


def smooth(t: Pixels) -> Pixels:
    """Rise from 0 (t <= 0) to 1 (t >= 1) with flat ends."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def bump(t: Pixels) -> Pixels:
    """Fall from 1 at t = 0 to 0 at |t| = 1: a bell from basic operations."""
    t = 1 - np.minimum(t * t, 1)
    return t * t


class Film:
    """One chunk of images: the coordinates of their pixels, their truths, and the shapes they share."""

    def __init__(self, latents: dict[str, np.ndarray], rows: np.ndarray, size: int, stream: Stream):
        self.size, self.rows, self.stream = size, rows, stream
        self.pixel = np.float32(2 / size)
        self.truth = {k: np.asarray(v, np.float32)[:, None, None] for k, v in latents.items()}
        self.patient = latents["patient"]
        self.place()

    def vary(self, name: str, low: float, high: float, by_patient: bool = False) -> Pixels:
        """Return a uniform draw per image (or per patient) as float32 [sample, 1, 1]."""
        u = self.stream.uniform(name, self.patient if by_patient else self.rows)
        return (low + (high - low) * u).astype(np.float32)[:, None, None]

    def inside(self, distance: Pixels, softness: float) -> Pixels:
        """Cover what has a negative signed distance, with an edge no sharper than a pixel."""
        width = max(np.float32(softness), self.pixel)
        return smooth(0.5 - distance / (2 * width))

    def line(self, distance: Pixels, width: Pixels) -> Pixels:
        """Cover a line of `width` around distance 0, box-filtered by the pixel (thin lines fade, not vanish)."""
        half = (width + self.pixel) / 2
        return np.clip((half - np.abs(distance)) / self.pixel, 0, np.minimum(width / self.pixel, 1))

    def place(self) -> None:
        """Set coordinates in the patient's frame (rotated, shifted, scaled) and the shape of the lungs."""
        t = self.truth
        axis = (np.arange(self.size, dtype=np.float32) + np.float32(0.5)) * self.pixel - 1
        self.film_x, self.film_y = axis[None, None, :], axis[None, :, None]
        tilt = self.vary("tilt", -0.035, 0.035)
        cos, sin = (1 - tilt * tilt) / (1 + tilt * tilt), 2 * tilt / (1 + tilt * tilt)
        zoom = self.vary("zoom", 0.97, 1.07) + 0.03 * t["ap"]
        x = self.film_x - self.vary("shift x", -0.06, 0.06)
        y = self.film_y - self.vary("shift y", -0.05, 0.05)
        self.x, self.y = (cos * x + sin * y) / zoom, (cos * y - sin * x) / zoom
        self.away = np.abs(self.x)
        self.right = (self.x < 0).astype(np.float32)

        chest = 0.94 + 0.09 * t["male"] + 0.04 * (t["habitus"] - 0.5)
        self.half_width = self.vary("lung width", 0.31, 0.35, True) * chest
        self.centre = 0.065 + self.half_width
        self.apex = self.vary("lung height", 0.82, 0.9, True) * (0.97 + 0.04 * t["male"])
        low = 0.4 + 0.16 * t["inspiration"] - 0.1 * t["ap"] + 0.03 * t["male"]
        dome = np.where(self.right, low - 0.05, low)
        across = (self.away - 0.3) / 0.42
        self.diaphragm = dome + self.vary("dome", 0.13, 0.22) * across * across
        self.lung = self.inside(self.lung_distance(0, 0, 0), 0.03)
        self.abdomen = self.inside(self.diaphragm - self.y, 0.03)

    def lung_distance(self, inwards: Pixels, downwards: Pixels, upwards: Pixels) -> Pixels:
        """Signed distance to the lungs whose wall, apex and base are drawn in by the given lengths."""
        half_width = self.half_width - inwards / 2
        centre = self.centre - inwards / 2
        sideways = (self.away - centre) / (half_width * (1 + 0.1 * self.y))
        above = np.minimum(self.y - 0.05, 0) / (self.apex - downwards)
        wall = (np.sqrt(sideways * sideways + above * above) - 1) * half_width
        return np.maximum(wall, self.y - self.diaphragm + upwards)

    def develop(self, visibility: float, grain: float) -> np.ndarray:
        """Sum the attenuations and expose the film: uint8 [sample, size, size]."""
        t = self.truth
        side = np.where(self.right, 1 - t["left"], t["left"])
        air, edge, collapsed = self.pneumothorax(side)
        heart = self.heart()
        aerated = self.lung * (1 - 0.8 * heart)
        image = self.soft_tissue()
        image -= aerated * self.vary("aeration", 0.26, 0.32)
        image += aerated * self.markings() * (1 - air)
        image += heart * 0.2 + self.mediastinum() + self.bones()
        image += aerated * (collapsed - np.float32(visibility) * (0.21 * air - 0.25 * edge))
        image += self.folds_and_leads(aerated) + self.drain(side)
        return self.expose(image, np.float32(grain))

    def pneumothorax(self, side: Pixels) -> tuple[Pixels, Pixels, Pixels]:
        """Return the free air, the pleural edge and the density of the retracted lung.

        Upright (PA) the air rises to the apex; on bedside films (AP) it lies laterally and at the base.
        """
        t = self.truth
        extent = t["extent"] * side
        inwards = extent * (0.55 + 0.15 * t["ap"])
        downwards = extent * (0.75 - 0.5 * t["ap"])
        distance = self.lung_distance(inwards, downwards, extent * 0.35 * t["ap"])
        present = (extent > 0).astype(np.float32)
        air = (1 - self.inside(distance, 0.02)) * present
        edge = self.line(distance, np.float32(0.03)) * present
        return air * self.lung, edge * self.lung, (1 - air) * extent * 0.08

    def soft_tissue(self) -> Pixels:
        """Chest wall, shoulders, neck, abdomen, stomach bubble and breasts; black air outside the body."""
        t, x, y, away = self.truth, self.x, self.y, self.away
        slope = smooth((y + 1.05) / 0.4)
        wall = 0.8 + 0.08 * t["habitus"] + 0.05 * t["male"] + 0.06 * np.clip(y, 0, 1)
        outline = 0.2 + (wall + 0.1 * bump((y + 0.55) / 0.4) - 0.2) * slope
        body = self.inside(away - outline, 0.05)
        thick = 0.46 + 0.09 * t["habitus"] + 0.05 * bump((y + 0.6) / 0.5)
        abdomen = self.abdomen * 0.17
        bubble_x = (x - self.vary("bubble x", 0.25, 0.42)) / 0.15
        bubble_y = (y - self.diaphragm - 0.11) / 0.08
        abdomen = abdomen - 0.13 * self.vary("bubble", -0.4, 1).clip(0) * bump(np.sqrt(bubble_x**2 + bubble_y**2))
        breast_x = (away - 0.42) / self.vary("breast width", 0.28, 0.36, True)
        breast_y = (y - self.vary("breast height", 0.22, 0.4, True)) / 0.3
        fold = self.inside((np.sqrt(breast_x * breast_x + breast_y * breast_y) - 1) * 0.3, 0.05)
        breast = (1 - t["male"]) * fold * (0.05 + 0.05 * t["habitus"]) * (0.7 + 0.5 * np.clip(breast_y, -1, 1))
        return body * (thick + abdomen + breast)

    def heart(self) -> Pixels:
        """Heart with the aortic knob; larger with age and on AP films, where it is magnified."""
        t, x, y = self.truth, self.x, self.y
        grown = 0.9 + 0.2 * t["heart"] + 0.12 * t["ap"] + 0.0016 * (t["age"] - 50)
        a, b = 0.3 * grown, 0.33 * grown
        dx, dy = x - 0.1 * grown, y - (self.diaphragm_level() - 0.2 * grown)
        u, v = (dx - 0.45 * dy) / a, (dy - 0.1 * dx) / b
        chambers = self.inside((np.sqrt(u * u + v * v) - 1) * a, 0.035)
        knob_x, knob_y = (x - 0.1) / (0.1 + 0.0006 * (t["age"] - 50)), (y + 0.33) / 0.12
        knob = self.inside((np.sqrt(knob_x * knob_x + knob_y * knob_y) - 1) * 0.1, 0.04)
        return np.maximum(chambers * (1 - 0.8 * self.abdomen), 0.8 * knob)

    def diaphragm_level(self) -> Pixels:
        t = self.truth
        return 0.42 + 0.16 * t["inspiration"] - 0.1 * t["ap"]

    def mediastinum(self) -> Pixels:
        """Spine, great vessels, trachea and hila."""
        t, y, away = self.truth, self.y, self.away
        vessels = 0.11 + (0.03 + 0.04 * t["ap"]) * bump((y + 0.45) / 0.35) + 0.07 * smooth((y + 0.25) / 0.3)
        band = self.inside(away - vessels, 0.05)
        disc = y * 6.5
        spine = self.inside(away - 0.075, 0.03) * (0.07 + 0.02 * bump((disc - np.floor(disc) - 0.5) * 2))
        trachea = self.inside(np.abs(self.x + 0.01) - 0.035, 0.03) * smooth((-0.28 - y) / 0.15)
        hilum_x, hilum_y = (away - 0.17) / 0.12, (y + 0.02 - 0.04 * self.right) / 0.2
        hilum = bump(np.sqrt(hilum_x * hilum_x + hilum_y * hilum_y))
        return 0.13 * band + spine - 0.1 * trachea + self.vary("hilum", 0.06, 0.12, True) * hilum

    def bones(self) -> Pixels:
        """Ribs, clavicles and, on AP films, the scapulae over the lungs; paler in old age."""
        t, y, away = self.truth, self.y, self.away
        dense = (1.1 - 0.005 * (t["age"] - 50)) * np.float32(0.9)
        gap = self.vary("rib spacing", 0.165, 0.195, True)
        cage = self.inside(away - 1.16 * (self.centre + self.half_width) + 0.2 * np.square(y - 0.2), 0.05)
        cage = cage * smooth((y + 0.9) / 0.1) * smooth((0.85 - y) / 0.4)
        behind = (y + 0.55 * away * away - 0.3 * away + self.vary("ribs", 0, 0.19, True)) / gap
        before = (y - 0.62 * away + 0.1 + self.vary("ribs", 0, 0.19, True)) / gap
        ribs = 0.085 * self.rib(behind, gap) * smooth((away - 0.06) / 0.08)
        ribs = ribs + 0.05 * self.rib(before, gap) * smooth((away - 0.3) / 0.15) * smooth((y + 0.5) / 0.3)
        height = -0.66 - 0.05 * t["ap"] + 0.24 * away * away - 0.3 * away + 0.17
        collar = self.line(y - height, np.float32(0.075)) * smooth((away - 0.07) / 0.04) * smooth((0.85 - away) / 0.2)
        blade = self.inside(np.abs(away - 0.66 - 0.12 * (y + 0.2)) - 0.07, 0.03) * bump((y + 0.3) / 0.42)
        shoulder = self.inside(np.sqrt(np.square(away - 0.9) + np.square(y + 0.72)) - 0.15, 0.05)
        return dense * (ribs * cage + 0.11 * collar + (0.02 + 0.05 * t["ap"]) * blade + 0.12 * shoulder)

    def rib(self, phase: Pixels, gap: Pixels) -> Pixels:
        """Bright bands at whole phases with brighter rims, as flat as the pixels are coarse."""
        off = np.abs(phase - np.floor(phase) - 0.5) * gap
        half = 0.22 * gap
        band = self.inside(off - half, 0.012)
        return band * (0.8 + 0.35 * bump((off - half + 0.012) / 0.02))

    def markings(self) -> Pixels:
        """Vessels that fan out from the hila and thin towards the wall, from ridges of a noise over angle."""
        across = self.away - 0.13
        down = self.y + 0.02
        reach = np.abs(across) + np.abs(down) + np.float32(1e-3)
        angle = down / reach
        angle = np.where(across < 0, np.where(down < 0, -2 - angle, 2 - angle), angle)
        angle = angle + np.where(self.right, np.float32(5), np.float32(0))
        near = self.ridges("near vessels", angle * 3.2 + reach * 1.3) * smooth(1.25 - reach / 0.5)
        far = self.ridges("far vessels", angle * 7.1 - reach * 1.7) * smooth(reach / 0.25) * smooth(1.25 - reach)
        return 0.15 * near + 0.12 * far

    def ridges(self, name: str, position: Pixels) -> Pixels:
        """Return 0 to 1, with 1 along the zero crossings of a smooth random function of `position`."""
        knots = 64
        bits = self.stream.bits(name, self.rows[:, None] * knots + np.arange(knots)) >> np.uint64(40)
        table = bits.astype(np.float32) * np.float32(2.0**-23) - 1
        whole = np.floor(position)
        index = (whole.astype(np.int32) & (knots - 1)) + (np.arange(len(table), dtype=np.int32) * knots)[:, None, None]
        after = np.where((index & (knots - 1)) == knots - 1, index - knots + 1, index + 1)
        table = table.ravel()
        left, right = table.take(index), table.take(after)
        value = left + (right - left) * smooth(position - whole)
        return bump(np.minimum(np.abs(value) * 2.2, 1))

    def folds_and_leads(self, aerated: Pixels) -> Pixels:
        """Skin folds (an edge that mimics the pleura, with markings beyond it) and leads with electrodes."""
        t, x, y = self.truth, self.x, self.y
        side = np.where(self.vary("fold side", 0, 1) < 0.5, np.float32(1), np.float32(-1))
        place = self.vary("fold place", 0.4, 0.6) + self.vary("fold slope", -0.15, 0.25) * y
        off = side * x - place
        fold = smooth(1 + off / 0.16) * (off < 0) * smooth((y + 0.75) / 0.2) * smooth((0.45 - y) / 0.2)
        image = 0.07 * t["skin_fold"] * fold * aerated
        for number in range(3):
            spot_x = self.vary(f"lead x {number}", -0.65, 0.65)
            spot_y = self.vary(f"lead y {number}", -0.6, 0.4)
            bend = self.vary(f"lead bend {number}", -0.5, 0.5)
            spot = self.inside(np.sqrt(np.square(x - spot_x) + np.square(y - spot_y)) - 0.035, 0.015)
            fall = y - spot_y
            slope = bend * fall
            wire = self.line((x - spot_x - slope * fall / 2) / np.sqrt(1 + slope * slope), np.float32(0.014))
            image = image + t["leads"] * (0.22 * spot + 0.2 * wire * (fall > 0))
        return image

    def drain(self, side: Pixels) -> Pixels:
        """Chest drain: a bright tube from the lateral wall towards the apex, with a dark core where pixels are fine."""
        tip_x, tip_y = self.vary("tip x", 0.2, 0.42), self.vary("tip y", -0.55, -0.05)
        entry_y = self.vary("entry y", 0.12, 0.42)
        entry_x = self.centre + self.half_width
        along = (self.y - tip_y) / (entry_y - tip_y)
        spread = entry_x - tip_x
        slope = 2 * spread * along / (entry_y - tip_y)
        off = (self.away - tip_x - spread * along * along) / np.sqrt(1 + slope * slope)
        tube = self.line(off, np.float32(0.042)) - 0.6 * self.line(off, np.float32(0.016))
        return self.truth["drain"] * side * 0.45 * tube * (along > 0) * (along < 1.15)

    def expose(self, image: Pixels, grain: np.float32) -> np.ndarray:
        """Scatter, detector noise, the site's processing, marker and collimation; quantise to uint8."""
        t = self.truth
        site_b, site_c = (t["site"] == 1).astype(np.float32), (t["site"] == 2).astype(np.float32)
        scatter = 0.08 * t["ap"] + 0.03 * t["habitus"] + 0.04 * site_c
        image = image * (1 - scatter) + 0.6 * scatter
        image = image + self.vary("heel x", -0.05, 0.05) * self.film_x + self.vary("heel y", -0.05, 0.05) * self.film_y
        level = 0.026 + 0.01 * t["ap"] + 0.008 * site_c - 0.006 * site_b
        image = image + grain * level * self.noise()
        image = np.clip((image - 0.08) * (1.02 + 0.14 * t["exposure"] + 0.06 * site_b) + 0.02, 0, 1)
        image = image + site_b * 0.3 * image * (1 - image)
        image = self.marker(image, site_b, site_c)
        return np.floor(np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)

    def marker(self, image: Pixels, site_b: Pixels, site_c: Pixels) -> Pixels:
        """Lead letter in the site's corner; site C also leaves the collimator's black border."""
        x, y = self.film_x, self.film_y
        corner_x = 0.84 - 1.68 * site_b
        stem = self.line(x - corner_x + 0.03, np.float32(0.03)) * (np.abs(y + 0.8) < 0.08)
        foot = self.line(y + 0.73, np.float32(0.03)) * (np.abs(x - corner_x) < 0.045)
        image = np.maximum(image, 0.95 * np.maximum(stem, foot))
        shutters = self.vary("collimator x", 0.9, 1), self.vary("collimator y", 0.9, 1)
        outside = np.maximum(np.abs(x) - shutters[0], np.abs(y) - shutters[1])
        return image * (1 - 0.95 * site_c * self.inside(-outside, 0.005))

    def noise(self) -> Pixels:
        """Return nearly normal noise of unit variance, the sum of four 16-bit uniforms of one hash."""
        keys = self.stream.bits("noise", self.rows)[:, None]
        count = self.size * self.size
        bits = scattered(keys, np.arange(count)).view(np.uint16).reshape(-1, count, 4)
        total = bits[..., 0].astype(np.float32)
        for part in range(1, 4):
            total += bits[..., part]
        total = (total - 131070) * np.float32(1 / 37837.2)  # standard deviation of the sum: 65536 / sqrt(3)
        return total.reshape(-1, self.size, self.size)
