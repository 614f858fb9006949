"""The twelve 2D MedMNIST v2 sets (Yang et al., Scientific Data 2023), by name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ..errors import Unavailable, UserError
from ..identity import added_later
from .api import SPLITS, Data, Split, default_data_root, register_dataset
from .layout import image_array, label_array, read_arrays

TASK_OF = {
    "binary-class": "binary",
    "multi-class": "multiclass",
    "ordinal-regression": "ordinal",
    "multi-label, binary-class": "multilabel",
}
# BreastMNIST numbers malignant 0 and calls normal and benign positive.
POSITIVE = {"breastmnist": 1, "pneumoniamnist": 1}
NOTES = {
    "breastmnist": ["positive class: normal and benign (1); malignant is class 0"],
    "dermamnist": [
        "licence CC BY-NC 4.0: no commercial use",
        "train-test leakage: HAM10000 holds several images per lesion, and the split is not by lesion",
    ],
}
SIZES = (28, 64, 128, 224)
LABELS = ("fine", "coarse")


@dataclass(frozen=True)
class Coarse:
    """Two superclasses of a multi-class set: their names, and which fine labels the positive one holds."""

    negative: str
    positive: str
    of_positive: tuple[int, ...]


_ORGANS = Coarse("thorax or pelvis", "upper abdomen", (4, 5, 6, 9, 10))
COARSE = {
    # Tumour epithelium and the stroma it induces, against tissue that is found without a tumour, too (Kather et al.,
    # PLoS Medicine 2019).
    "pathmnist": Coarse("other tissue", "tumour-associated", (7, 8)),
    # Actinic keratosis and intraepithelial carcinoma, basal cell carcinoma and melanoma are treated, the others need
    # not be (Tschandl et al., Scientific Data 2018).
    "dermamnist": Coarse("benign", "malignant or premalignant", (0, 1, 4)),
    # Neovascularisation and macular oedema are referred urgently, drusen are not (Kermany et al., Cell 2018).
    "octmnist": Coarse("no urgent referral", "urgent referral", (0, 1)),
    # Granulocytes, mature or not, against the other cells of peripheral blood (Acevedo et al., Data in Brief 2020).
    "bloodmnist": Coarse("other blood cell", "granulocyte", (0, 1, 3, 6)),
    # Epithelium of the tubules, against glomerulus, vessels and leukocytes (Woloshuk et al., Cytometry A 2021).
    "tissuemnist": Coarse("no tubule", "tubular epithelium", (0, 1, 6, 7)),
    # Kidneys, liver, pancreas, spleen, against bladder, femora, heart, lungs: by region of the body (Bilic et al.,
    # Medical Image Analysis 2023).
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}


@register_dataset(
    "pathmnist",
    "chestmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)
@dataclass
class MedMNIST:
    """MedMNIST v2: real images of one of its twelve 2D sets, at 28, 64, 128 or 224 pixels.

    labels: fine, as published, or coarse: the classes of a multi-class set merged into two (see `COARSE`), a binary
    task whose fine labels stay hidden in `latents["fine"]`.
    """

    size: int = 28
    labels: str = added_later("fine")

    name = ""
    version: ClassVar[int] = 1

    def load(self, data_root: Path | None = None) -> Data:
        """Read the official npz from `data_root`, or from its `medmnist` folder.

        Without a `data_root` the default one and ~/.medmnist are searched, and a file that is in neither is downloaded
        into ~/.medmnist. Raises UserError when there is no such file or it is malformed, and for coarse labels of a set
        that is not multi-class.
        """
        if self.labels not in LABELS:
            raise UserError(f"dataset.labels={self.labels}: {' or '.join(LABELS)}")
        if self.labels == "coarse" and self.name not in COARSE:
            raise UserError(
                f"dataset.labels=coarse: {self.name} has no coarse labels, only {', '.join(COARSE)} have: "
                "leave dataset.labels=fine"
            )
        if self.size not in SIZES:
            raise UserError(f"dataset.size={self.size}: MedMNIST comes in {', '.join(map(str, SIZES))} pixels")
        info = published()[self.name]
        file = self._file(data_root, info)
        arrays = read_arrays(file)
        names = [info["label"][str(c)] for c in range(len(info["label"]))]
        data = Data(
            name=self.name,
            task=TASK_OF[info["task"]],
            classes=names,
            splits={split: _split(arrays, split, file) for split in SPLITS},
            positive=POSITIVE.get(self.name),
            licence=info["license"],
            source="MedMNIST v2 (Yang et al., Scientific Data 2023), https://medmnist.com",
            notes=NOTES.get(self.name, []) + _differences(file, self._suffixed(info, "MD5"), arrays, info),
            location=str(file),
        )
        return _coarsened(data, COARSE[self.name]) if self.labels == "coarse" else data

    def _suffixed(self, info: dict[str, Any], key: str) -> str:
        return info[key if self.size == 28 else f"{key}_{self.size}"]

    def _file(self, data_root: Path | None, info: dict[str, Any]) -> Path:
        filename = f"{self.name}.npz" if self.size == 28 else f"{self.name}_{self.size}.npz"
        cache = Path.home() / ".medmnist"
        roots = [data_root] if data_root else [default_data_root(), cache]
        for root in roots:
            for folder in (root, root / "medmnist"):
                if (folder / filename).is_file():
                    return folder / filename
        url = self._suffixed(info, "url")
        if data_root and data_root.is_file():
            raise UserError(f"data_root={data_root} is a file: for {self.name} name the folder that holds {filename}")
        explicit = data_root or (default_data_root() if os.environ.get("MULTIPLICITY_BENCH_DATA") else None)
        if explicit:
            raise UserError(
                f"{filename} is neither in {explicit} nor in {explicit / 'medmnist'}: put it there (from {url})"
            )
        return download(url, cache / filename, self._suffixed(info, "MD5"))


def published() -> dict[str, dict[str, Any]]:
    """Return what the medmnist package knows about its sets: addresses, MD5s, tasks, labels, counts, licences.

    Its info.py is run by itself: importing the package would import torchvision and scikit-image, for seconds.
    """
    package = importlib.util.find_spec("medmnist")
    if package is None or package.origin is None:
        raise Unavailable("the MedMNIST sets need the package medmnist: pip install medmnist")
    return runpy.run_path(str(Path(package.origin).with_name("info.py")))["INFO"]


def download(url: str, file: Path, md5: str, timeout: float = 30.0) -> Path:
    """Fetch `url` into `file`, which appears only when it is complete and its MD5 is right.

    Raises UserError naming file, folder and address when there is no network, no space or a wrong checksum.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    advice = f"download {url} yourself and put it into {file.parent}, or name its folder with data_root=FOLDER"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=timeout) as remote, open(partial, "wb") as local:
            found = _copy(remote, local, file.name)
        if found != md5:
            raise UserError(f"{file.name} arrived damaged (MD5 {found}, should be {md5}): try again, or {advice}")
        os.replace(partial, file)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{file.name} is not in {file.parent} and could not be fetched ({reason}): {advice}") from None
    finally:
        partial.unlink(missing_ok=True)
    return file


def _copy(remote: Any, local: BinaryIO, name: str) -> str:
    """Copy with a progress bar; return the MD5 of what was copied."""
    from tqdm import tqdm

    md5 = hashlib.md5(usedforsecurity=False)
    total = int(remote.headers.get("Content-Length") or 0) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"downloading {name}", disable=None) as progress:
        while block := remote.read(1 << 20):
            local.write(block)
            md5.update(block)
            progress.update(len(block))
    return md5.hexdigest()


def _split(arrays: dict[str, np.ndarray], split: str, file: Path) -> Split:
    images = image_array(arrays, split, file)
    return Split(images, label_array(arrays, split, len(images), file), np.arange(len(images)))


def _coarsened(data: Data, coarse: Coarse) -> Data:
    """Return the binary task of two superclasses, with the fine labels as a latent."""
    splits = {}
    for name, split in data.splits.items():
        labels = np.isin(split.labels, coarse.of_positive).astype(np.int64)
        splits[name] = replace(split, labels=labels, latents={**split.latents, "fine": split.labels})
    values = {**data.attribute_values, "fine": list(data.classes)}
    held = ", ".join(data.classes[c] for c in coarse.of_positive)
    note = f"coarse labels: {coarse.positive} (positive, 1) is {held}; {coarse.negative} (0) the other classes"
    return replace(
        data,
        task="binary",
        classes=[coarse.negative, coarse.positive],
        splits=splits,
        positive=1,
        attribute_values=values,
        notes=[*data.notes, note],
    )


def _differences(file: Path, md5: str, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> list[str]:
    """Say how a file differs from the official one: it may be a subset made on purpose."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found == md5:
        return []
    counts = {split: len(arrays[f"{split}_images"]) for split in SPLITS}
    notes = [f"not the official file: MD5 {found}, official {md5}"]
    if counts != info["n_samples"]:
        text = "/".join(map(str, counts.values()))
        notes.append(f"not the official counts: {text}, official {'/'.join(map(str, info['n_samples'].values()))}")
    return notes
