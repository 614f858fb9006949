"""Films become images: each format, crop and intensity, what cannot be read, and decoding that goes on after a kill."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from multiplicity_bench.datasets import decoding
from multiplicity_bench.datasets.decoding import Temporary, decode, decode_films
from multiplicity_bench.datasets.films import Films, Rendering
from multiplicity_bench.errors import UserError
from multiplicity_bench.identity import digest
from PIL import Image


class Kept:
    """A cache in a folder: what is finished is found again, what is not is gone on with."""

    def __init__(self, root: Path):
        self.root, self.computed = root, 0

    def produce(self, spec, compute):
        folder = self.root / digest(spec)
        if not (folder / "finished").exists():
            (folder / "scratch").mkdir(parents=True, exist_ok=True)
            self.computed += 1
            compute(folder, folder / "scratch")
            (folder / "finished").touch()
        return folder

    def progress(self, items, description, total=None):
        return items


def noise(height: int, width: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, high, (height, width)).astype(dtype)


def write(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(path, **options)
    return path


def write_dicom(path: Path, pixels: np.ndarray, **tags) -> Path:
    film = pydicom.Dataset()
    film.file_meta = pydicom.dataset.FileMetaDataset()
    film.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    film.SOPClassUID, film.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    film.Rows, film.Columns, film.SamplesPerPixel = *pixels.shape, 1
    film.PhotometricInterpretation, film.PixelRepresentation = "MONOCHROME2", int(pixels.dtype.kind == "i")
    film.BitsAllocated = film.BitsStored = 8 * pixels.itemsize
    film.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(film, name, value)
    film.HighBit = film.BitsStored - 1
    film.save_as(path, enforce_file_format=True)
    return path


def films_in(root: Path, count: int, **settings) -> Films:
    for k in range(count):
        write(root / f"{k:03d}.png", noise(20, 20, k))
    return Films(root, [f"{k:03d}.png" for k in range(count)], Rendering(size=16), **settings)


def refused(films: Films, cache=None) -> str:
    with pytest.raises(UserError) as raised:
        decode_films(films, cache or Temporary())
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_large_png_is_what_pillow_gives_by_hand(tmp_path):
    pixels = noise(500, 400)
    path = write(tmp_path / "film.png", pixels)
    by_hand = Image.fromarray(pixels).reduce((2, 2)).resize((64, 64), Image.Resampling.BILINEAR)
    # 400 / 64 / 3 and 500 / 64 / 3 are 2: blocks of 2 x 2 leave three times the size
    np.testing.assert_array_equal(decode(path, Rendering(64))[0], np.asarray(by_hand))


def test_a_pattern_finer_than_the_pixels_averages_to_grey_and_gives_no_moire(tmp_path):
    board = (np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)
    found = decode(write(tmp_path / "board.png", board), Rendering(64))
    assert found.min() >= 126 and found.max() <= 129  # the mean is 127.5; picked pixels would be 0 and 255


def test_scaling_keeps_a_slope_where_it_is(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 900), (900, 1)).round().astype(np.uint8)
    found = decode(write(tmp_path / "ramp.png", ramp), Rendering(60))[0, 30].astype(float)
    centres = (np.arange(60) + 0.5) * 15 - 0.5
    # an average that is symmetric about a pixel's centre has the slope's value there; roundings to 8 bits: 1.5
    assert np.abs(found - centres * 255 / 899)[3:-3].max() < 1.5


GREY = noise(32, 32)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("RGB"),
        Image.fromarray(GREY).convert("LA"),
        Image.fromarray(np.dstack([GREY, GREY, GREY, noise(32, 32, 1)])),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY.astype(np.uint16) * 257),
    ],
    ids=lambda image: image.mode,
)
def test_an_image_of_the_wanted_size_comes_out_unchanged(image, tmp_path):
    for crop in ("none", "centre", "pad"):
        found = decode(write(tmp_path / "film.png", image), Rendering(32, crop))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, GREY[None])


def test_a_png_of_one_bit_is_black_and_white(tmp_path):
    path = write(tmp_path / "film.png", Image.fromarray(GREY).convert("1"))
    assert set(np.unique(decode(path, Rendering(32)))) == {0, 255}


def test_colours_become_their_luminance(tmp_path):
    colours = np.zeros((9, 9, 3), np.uint8)
    colours[:3, :, 0], colours[3:6, :, 1], colours[6:, :, 2] = 255, 255, 255
    found = decode(write(tmp_path / "film.png", colours), Rendering(9))[0]
    assert found[[0, 3, 6], 0].tolist() == [76, 150, 29]  # 0.299, 0.587 and 0.114 of 255


def test_16_bits_keep_what_is_between_two_of_8_until_the_end(tmp_path):
    pixels = noise(360, 300, dtype=np.uint16)
    found = decode(write(tmp_path / "film.png", pixels), Rendering(20))[0]
    exact = Image.fromarray(pixels.astype(np.float32)).reduce((5, 6)).resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, np.rint(np.asarray(exact, np.float64) / 257).astype(np.uint8))
    dark = write(tmp_path / "dark.png", (noise(400, 300) // 2).astype(np.uint16))  # all below half of one of 255
    assert decode(dark, Rendering(20)).max() == 0
    assert len(np.unique(decode(dark, Rendering(20, intensity="minmax")))) > 50


def test_a_jpeg_is_what_pillow_decodes_and_a_large_one_nearly_so(tmp_path):
    smooth = Image.fromarray(noise(32, 32)).resize((640, 512), Image.Resampling.BICUBIC)
    small = write(tmp_path / "small.jpg", smooth.resize((32, 32)), quality=95)
    np.testing.assert_array_equal(decode(small, Rendering(32))[0], np.asarray(Image.open(small)))
    large = write(tmp_path / "large.jpg", smooth.convert("RGB"), quality=95)
    whole = Image.open(large).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    # the JPEG's own transform averages 4 x 4 pixels first: another filter, a few grey values at the sharpest edges
    difference = np.abs(decode(large, Rendering(32))[0].astype(int) - np.asarray(whole))
    assert difference.mean() < 2 and difference.max() < 12


def test_centre_is_the_middle_square_and_pad_adds_black_borders(tmp_path):
    pixels = np.full((64, 128), 200, np.uint8)
    pixels[:, :32], pixels[:, 96:] = 50, 100
    path = write(tmp_path / "film.png", pixels)
    np.testing.assert_array_equal(decode(path, Rendering(64, "centre")), np.full((1, 64, 64), 200))
    padded = decode(path, Rendering(64, "pad"))[0]
    assert not padded[:16].any() and not padded[48:].any()
    halved = Image.fromarray(pixels).resize((64, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(padded[16:48], np.asarray(halved))
    tall = decode(write(tmp_path / "tall.png", pixels.T.copy()), Rendering(64, "pad"))[0]
    np.testing.assert_array_equal(tall, padded.T)


def test_a_strip_keeps_a_line_of_pixels_when_it_is_padded(tmp_path):
    found = decode(write(tmp_path / "strip.png", np.full((2, 900), 255, np.uint8)), Rendering(16, "pad"))[0]
    assert (found == 255).sum(1).tolist() == [0] * 7 + [16] + [0] * 8


def test_minmax_and_percentiles_spread_the_grey_values_and_ignore_borders(tmp_path):
    pixels = (np.arange(64 * 32).reshape(32, 64) % 101 + 60).astype(np.uint8)
    path = write(tmp_path / "film.png", pixels)
    spread = decode(path, Rendering(64, "pad", "minmax"))[0]
    np.testing.assert_array_equal(spread[16:48], np.rint((pixels.astype(float) - 60) * 255 / 100))
    assert not spread[:16].any()
    low, high = np.percentile(pixels, (1, 99))
    clipped = np.clip((pixels - low) * 255 / (high - low), 0, 255)
    np.testing.assert_array_equal(decode(path, Rendering(64, "pad", "percentile"))[0, 16:48], np.rint(clipped))


@pytest.mark.parametrize("intensity", ["minmax", "percentile"])
def test_an_image_without_contrast_becomes_black(intensity, tmp_path):
    path = write(tmp_path / "film.png", np.full((32, 32), 90, np.uint8))
    assert not decode(path, Rendering(32, intensity=intensity)).any()
    assert (decode(path, Rendering(32)) == 90).all()


def test_dicom_of_12_bits_is_scaled_by_the_bits_that_are_stored(tmp_path):
    pixels = noise(32, 32, dtype=np.uint16) >> 4
    path = write_dicom(tmp_path / "film.dcm", pixels, BitsStored=12)
    expected = np.rint(pixels * (255 / 4095))
    np.testing.assert_array_equal(decode(path, Rendering(32))[0], expected)
    nameless = path.rename(tmp_path / "film")
    np.testing.assert_array_equal(decode(nameless, Rendering(32))[0], expected)


def test_monochrome1_is_inverted(tmp_path):
    pixels = noise(32, 32, dtype=np.uint16) >> 4
    plain = decode(write_dicom(tmp_path / "2.dcm", pixels, BitsStored=12), Rendering(32))
    inverted = write_dicom(tmp_path / "1.dcm", pixels, BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(decode(inverted, Rendering(32)), 255 - plain)


def test_rescaled_and_signed_dicom_runs_between_the_ends_of_its_own_scale(tmp_path):
    pixels = noise(32, 32, dtype=np.int16)
    path = write_dicom(tmp_path / "film.dcm", pixels, RescaleSlope="0.5", RescaleIntercept="-100")
    np.testing.assert_array_equal(decode(path, Rendering(32))[0], np.rint((pixels.astype(float) + 32768) * 255 / 65535))
    falling = write_dicom(tmp_path / "falling.dcm", pixels, RescaleSlope="-2", RescaleIntercept="7")
    np.testing.assert_array_equal(decode(falling, Rendering(32)), 255 - decode(path, Rendering(32)))


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "its pixels are PALETTE COLOR"),
        ({"NumberOfFrames": 4}, "it holds 4 frames"),
        ({"RescaleIntercept": "1e400"}, "give no grey values"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "look-up table"),
        ({"PixelData": b"\0\0"}, "pixel data"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels"),
    ],
)
def test_dicom_that_is_no_plain_film_is_left_out_with_its_reason(tags, said, tmp_path):
    write(tmp_path / "good.png", GREY)
    write_dicom(tmp_path / "bad.dcm", noise(8, 8, dtype=np.uint16), **tags)
    found = decode_films(Films(tmp_path, ["bad.dcm", "good.png"], unreadable="exclude"), Temporary())
    assert list(found.unreadable) == ["bad.dcm"] and said in found.unreadable["bad.dcm"]


def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    write_dicom(tmp_path / "film.dcm", noise(8, 8, dtype=np.uint16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for unreadable in ("refuse", "exclude"):
        said = refused(Films(tmp_path, ["film.dcm"], unreadable=unreadable))
        assert "film.dcm" in said and "pip install 'multiplicity-bench[dicom]'" in said


def truncated(kind: str) -> bytes:
    whole = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(whole, kind)
    return whole.getvalue()[: len(whole.getvalue()) // 2]


def claiming(side: int) -> bytes:
    """Return a PNG whose header claims side x side pixels."""
    whole = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(whole, "PNG")
    head = bytearray(whole.getvalue())
    head[16:24] = side.to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    return bytes(head)


def tiff() -> bytes:
    whole = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(whole, "TIFF")
    return whole.getvalue()


BROKEN = {
    "truncated png": (truncated("PNG"), "truncated"),
    "truncated jpeg": (truncated("JPEG"), "truncated"),
    "header alone": (truncated("PNG")[:20], ""),
    "empty": (b"", "it is empty"),
    "text": (b"not an image", "it is no PNG, JPEG or DICOM file"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print", "it is no PNG, JPEG or DICOM file"),
    "tiff": (tiff(), "it is no PNG, JPEG or DICOM file"),
    "bomb": (claiming(50_000), "2500000000 pixels"),
    "smaller bomb": (claiming(12_000), "12000 x 12000 pixels"),
    "folder": (None, "it is no file"),
    "missing": (None, "No such file or directory"),
}


def break_film(root: Path, name: str, what: str) -> str:
    content, said = BROKEN[what]
    (root / name).unlink(missing_ok=True)
    if what == "folder":
        (root / name).mkdir()
    elif content is not None:
        (root / name).write_bytes(content)
    return said


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_film_that_cannot_be_read_is_refused_by_name_with_what_to_do(what, tmp_path):
    films = films_in(tmp_path, 6)
    said = break_film(tmp_path, "002.png", what)
    break_film(tmp_path, "004.png", what)
    message = refused(films)
    assert f"{tmp_path}: 2 of 6 films cannot be read, the first is 002.png" in message and said in message
    assert message.endswith("restore or remove them, or set dataset.unreadable=exclude")


def test_films_that_cannot_be_read_are_left_out_and_counted_where_the_films_say_so(tmp_path):
    films = films_in(tmp_path, 16, unreadable="exclude")
    for k, what in enumerate(BROKEN):
        break_film(tmp_path, f"{k:03d}.png", what)
    found = decode_films(films, Temporary())
    assert sorted(found.unreadable) == [f"{k:03d}.png" for k in range(len(BROKEN))]
    assert found.exclusions() == [
        f"{len(BROKEN)} of 16 films cannot be read and are left out: 000.png, 001.png, 002.png, ..."
    ]
    for row in range(len(BROKEN), 16):
        np.testing.assert_array_equal(found.images[row], decode(tmp_path / films.files[row], films.rendering))


def test_when_no_film_can_be_read_leaving_them_out_is_an_error(tmp_path):
    assert "2 of 2 films cannot be read" in refused(Films(tmp_path, ["a.png", "b.png"], unreadable="exclude"))


def test_an_exclusion_that_was_kept_is_still_an_error_where_films_are_not_to_be_left_out(tmp_path):
    films, cache = films_in(tmp_path / "films", 5, unreadable="exclude"), Kept(tmp_path / "kept")
    break_film(films.root, "003.png", "truncated png")
    decode_films(films, cache)
    strict = Films(films.root, films.files, films.rendering)
    assert "1 of 5 films" in refused(strict, cache) and cache.computed == 1


def test_what_could_not_be_read_is_tried_again_when_permissions_change(tmp_path, monkeypatch):
    films, cache = films_in(tmp_path / "films", 5, unreadable="exclude"), Kept(tmp_path / "kept")

    def guarded(path, rendering):
        if path.name == "001.png" and path.stat().st_mode & 0o777 == 0o200:
            raise PermissionError(errno.EACCES, "Permission denied")
        return decode(path, rendering)

    monkeypatch.setattr(decoding, "decode", guarded)
    (films.root / "001.png").chmod(0o200)
    assert decode_films(films, cache).unreadable == {"001.png": "Permission denied"}
    (films.root / "001.png").chmod(0o600)
    assert not decode_films(films, cache).unreadable


def test_a_failing_machine_is_no_property_of_a_film(tmp_path, monkeypatch):
    films = films_in(tmp_path, 3, unreadable="exclude")

    def failing(path, rendering):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(decoding, "decode", failing)
    with pytest.raises(OSError, match="Input/output error"):
        decode_films(films, Temporary())


@pytest.mark.parametrize("path", ["/etc/hosts.png", "../secret.png", "images/../../secret.png"])
def test_a_path_that_leaves_the_root_is_refused(path, tmp_path):
    write(tmp_path / "secret.png", GREY)
    write(tmp_path / "films" / "images" / "a.png", GREY)
    for unreadable in ("refuse", "exclude"):
        said = refused(Films(tmp_path / "films", ["images/a.png", path], unreadable=unreadable))
        assert f"{path} leaves {tmp_path}/films" in said


@pytest.mark.parametrize("link", ["films/link.png", "films/folder", "films/dangling.png"])
def test_a_link_that_leaves_the_root_is_refused(link, tmp_path):
    write(tmp_path / "outside" / "a.png", GREY)
    write(tmp_path / "films" / "b.png", GREY)
    target = {"films/link.png": "outside/a.png", "films/folder": "outside", "films/dangling.png": "outside/none.png"}
    (tmp_path / link).symlink_to(tmp_path / target[link])
    file = link.removeprefix("films/") + ("/a.png" if link.endswith("folder") else "")
    said = refused(Films(tmp_path / "films", ["b.png", file], unreadable="exclude"))
    assert f"{file} is a link that leaves {tmp_path}/films" in said


def test_links_inside_the_root_and_a_root_that_is_a_link_are_followed(tmp_path):
    write(tmp_path / "films" / "images" / "a.png", GREY)
    (tmp_path / "films" / "again").symlink_to("images")
    (tmp_path / "films" / "again.png").symlink_to("images/a.png")
    (tmp_path / "root").symlink_to("films")
    found = decode_films(
        Films(tmp_path / "root", ["again.png", "again/a.png", "images/a.png"], Rendering(32)), Temporary()
    )
    np.testing.assert_array_equal(found.images, np.stack([GREY[None]] * 3))


@pytest.mark.parametrize("cores", [1, 3])
def test_every_film_gets_its_own_image_whatever_the_number_of_cores(cores, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "usable_processors", lambda: cores)
    films = films_in(tmp_path, 2 * cores * decoding.AHEAD + 5)
    found = decode_films(films, Temporary())
    assert found.images.shape == films.shape and not found.images.flags.writeable
    for row, file in enumerate(films.files):
        np.testing.assert_array_equal(found.images[row], decode(tmp_path / file, films.rendering))


def test_decoded_films_are_found_again_until_a_file_or_the_rendering_changes(tmp_path):
    films, cache = films_in(tmp_path / "films", 4), Kept(tmp_path / "kept")
    first = decode_films(films, cache)
    again = decode_films(films, cache)
    assert cache.computed == 1
    np.testing.assert_array_equal(first.images, again.images)
    decode_films(Films(films.root, films.files, Rendering(16, "pad")), cache)
    decode_films(Films(films.root, films.files[:3], films.rendering), cache)
    assert cache.computed == 3
    os.utime(films.root / "002.png", ns=(0, 0))
    decode_films(films, cache)
    assert cache.computed == 4
    write(films.root / "002.png", noise(20, 20, 77))
    np.testing.assert_array_equal(decode_films(films, cache).images[2], decode(films.root / "002.png", films.rendering))


def test_decoding_goes_on_where_it_failed(tmp_path, monkeypatch):
    films, cache = films_in(tmp_path / "films", 60), Kept(tmp_path / "kept")
    monkeypatch.setattr(decoding, "usable_processors", lambda: 1)
    seen: list[str] = []

    def counted(path, rendering, stop=41):
        seen.append(path.name)
        if len(seen) == stop:
            raise OSError(errno.ENOSPC, "No space left on device")
        return decode(path, rendering)

    monkeypatch.setattr(decoding, "decode", counted)
    with pytest.raises(OSError, match="No space left"):
        decode_films(films, cache)
    seen.clear()
    monkeypatch.setattr(decoding, "decode", lambda path, rendering: counted(path, rendering, stop=0))
    found = decode_films(films, cache)
    assert seen == [f"{k:03d}.png" for k in range(40, 60)]
    for row, file in enumerate(films.files):
        np.testing.assert_array_equal(found.images[row], decode(films.root / file, films.rendering))


def test_after_films_were_refused_only_the_restored_ones_are_decoded(tmp_path, monkeypatch):
    films, cache = films_in(tmp_path / "films", 8), Kept(tmp_path / "kept")
    whole = (films.root / "005.png").read_bytes()
    about = (films.root / "005.png").stat()
    (films.root / "005.png").write_bytes(b"x" * len(whole))
    os.utime(films.root / "005.png", ns=(about.st_mtime_ns, about.st_mtime_ns))
    refused(films, cache)
    (films.root / "005.png").write_bytes(whole)
    os.utime(films.root / "005.png", ns=(about.st_mtime_ns, about.st_mtime_ns))
    seen: list[str] = []
    monkeypatch.setattr(decoding, "decode", lambda path, rendering: seen.append(path.name) or decode(path, rendering))
    found = decode_films(films, cache)
    assert seen == ["005.png"] and not found.unreadable


def decode_until_killed(films: Films, cache: Kept) -> None:
    """Decode in this process, which ends at the 50th film without a word, as by `kill -9`."""
    calls: list[Path] = []

    def dying(path, rendering):
        calls.append(path)
        if len(calls) == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, rendering)

    decoding.decode, decoding.SAVE_EVERY_S, decoding.usable_processors = dying, -1.0, lambda: 1
    decode_films(films, cache)


def test_decoding_goes_on_after_a_kill(tmp_path, monkeypatch):
    films, cache = films_in(tmp_path / "films", 70), Kept(tmp_path / "kept")
    process = multiprocessing.get_context("fork").Process(target=decode_until_killed, args=(films, cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen: list[str] = []
    monkeypatch.setattr(decoding, "decode", lambda path, rendering: seen.append(path.name) or decode(path, rendering))
    found = decode_films(films, cache)
    # 49 were decoded, some of which waited to be written
    assert 70 - 49 <= len(seen) <= 70 - 49 + decoding.AHEAD + 1
    for row, file in enumerate(films.files):
        np.testing.assert_array_equal(found.images[row], decode(films.root / file, films.rendering))


@pytest.mark.parametrize("broken", ["done.npy", "images.npy", "images.npy cut off"])
def test_a_checkpoint_that_is_broken_counts_as_none(broken, tmp_path, monkeypatch):
    films, cache = films_in(tmp_path / "films", 6), Kept(tmp_path / "kept")
    break_film(films.root, "003.png", "text")
    refused(films, cache)
    (folder,) = (tmp_path / "kept").iterdir()
    if broken == "done.npy":
        (folder / "scratch" / broken).write_bytes(b"\x93NUMPY")
    elif broken == "images.npy":
        (folder / broken).unlink()
    else:
        os.truncate(folder / "images.npy", 500)
    found = decode_films(Films(films.root, films.files, films.rendering, "exclude"), cache)
    for row in (0, 1, 2, 4, 5):
        np.testing.assert_array_equal(found.images[row], decode(films.root / films.files[row], films.rendering))


def test_without_a_cache_films_are_decoded_into_a_folder_that_goes_with_the_process(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(
        decoding.atexit, "register", lambda f, *args, **named: at_exit.append(lambda: f(*args, **named))
    )
    monkeypatch.setattr(decoding.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    found = decode_films(films_in(tmp_path / "films", 3), Temporary())
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    for leave in at_exit:
        leave()
    assert not list((tmp_path / "scratch").iterdir())
    np.testing.assert_array_equal(found.images[2], decode(tmp_path / "films" / "002.png", Rendering(16)))


@pytest.mark.real
def test_the_real_sample_is_decoded_as_pillow_decodes_it(real_data):
    root = real_data / "nih_chest_xray14_sample"
    if not root.is_dir():
        pytest.skip(f"no radiographs at {root}")
    files = sorted(f"images/{path.name}" for path in (root / "images").iterdir())[:100]
    found = decode_films(Films(root, files, Rendering(64)), Temporary())
    for row, file in enumerate(files):
        np.testing.assert_array_equal(found.images[row, 0], np.asarray(Image.open(root / file).convert("L")))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rendering(size=4), "dataset.size=4"),
        (lambda: Rendering(crop="center"), "did you mean 'centre'?"),
        (lambda: Rendering(intensity="max"), "dataset.intensity=max"),
        (lambda: Films(Path(), [], unreadable="ignore"), "dataset.unreadable=ignore"),
    ],
)
def test_a_setting_outside_its_range_is_refused(make, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        make()
