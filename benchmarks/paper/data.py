"""The data of the tables: what is in the files, and how 8-bit images become real numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TRAIN, VALIDATION, TEST = range(3)
BINARY = ("adult", "dna", "mushrooms", "nips", "ocr_letters")
ALPHA = 1e-6
"""Keeps the logit of a pixel finite."""
BLOCK = 4096
"""Rows that are dequantised at a time."""


@dataclass(frozen=True)
class Data:
    """A data set in three parts.

    Attributes
    ----------
    parts : three (n, D) arrays
        Training, validation and test rows: float32, or 8-bit pixels where there is a transform.
    labels : three (n,) arrays, optional
        The class of each row; a model is then conditioned on it, one-hot.
    transform : callable, optional
        Takes pixels in (0, 1) to the rows to be modelled.
    symmetries : (k, D) array, optional
        Permutations of the pixels under which the data look the same; training rows go through one at random in each epoch.
    """

    parts: tuple[Array, ...]
    labels: tuple[Array, ...] | None = None
    transform: Callable[[Array], Array] | None = None
    symmetries: Array | None = None

    def training(self, seed: int) -> Callable[[int], Array] | Array:
        """What `fit` takes: the rows, or for each epoch those with fresh noise and symmetries, a function of seed and epoch."""
        return self.parts[TRAIN] if self.transform is None else lambda epoch: self.rows(TRAIN, seed, epoch, self.symmetries)

    def rows(self, part: int, seed: int = 0, epoch: int = 0, symmetries: Array | None = None) -> Array:
        """One part; the noise of validation and test rows is the same in every run."""
        if self.transform is None:
            return self.parts[part]
        return dequantised(self.parts[part], self.transform, seed, part, epoch, symmetries)

    def context(self, part: int) -> Array | None:
        """The class of each row, one-hot (n, classes), if there are classes."""
        return None if self.labels is None else np.eye(self.classes, dtype=np.float32)[self.labels[part]]

    @property
    def classes(self) -> int:
        """How many there are; 0 without labels."""
        return 0 if self.labels is None else int(self.labels[TRAIN].max()) + 1


def dequantised(
    pixels: Array, transform: Callable[[Array], Array], seed: int, part: int, epoch: int, symmetries: Array | None = None
) -> Array:
    """Pixels plus uniform noise over 256, transformed; block by block, in float32 at last."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, part << 32 | epoch], np.uint64)))
    out = np.empty((len(pixels), transform(np.full((1, pixels.shape[1]), 0.5)).shape[1]), np.float32)
    for first in range(0, len(pixels), BLOCK):
        block = pixels[first : first + BLOCK]
        if symmetries is not None:
            block = np.take_along_axis(block, symmetries[rng.integers(len(symmetries), size=len(block))], axis=1)
        out[first : first + BLOCK] = transform((rng.random(block.shape) + block) / 256)
    return out


def logit(x: Array) -> Array:
    """The space in which MNIST is modelled and scored."""
    x = ALPHA + (1 - 2 * ALPHA) * x
    return np.asarray(np.log(x) - np.log1p(-x))


def centred(x: Array) -> Array:
    """Patches less their mean, without the last pixel, which the others then determine."""
    return np.asarray((x - x.mean(axis=1, keepdims=True))[:, :-1])


def mnist(folder: Path, labelled: bool = False) -> Data:
    """MNIST: 50,000 training rows, 10,000 for validation, 10,000 for the test."""
    file = np.load(folder / "mnist_u8.npz")
    x, y = file["x_train"], file["y_train"]
    labels = (y[:50000], y[50000:], file["y_test"]) if labelled else None
    return Data((x[:50000], x[50000:], file["x_test"]), labels, logit)


def turned(side: int) -> Array:
    """The eight ways of turning and mirroring a square image, as permutations of its pixels, (8, side * side)."""
    image = np.arange(side * side).reshape(side, side)
    return np.stack([np.rot90(one, turns).ravel() for one in (image, image.T) for turns in range(4)])


def bsds(folder: Path) -> Data:
    """Patches of 8 x 8 pixels of the BSDS300 photographs, D = 63."""
    file = np.load(folder / "bsds300_like_patches_u8.npz")
    return Data((file["train"], file["val"], file["test"]), transform=centred, symmetries=turned(8))


def binary(folder: Path, name: str) -> Data:
    """A binary set of the MADE paper."""
    file = np.load(folder / "made" / f"{name}.npz")
    return Data(tuple(file[part].astype(np.float32) for part in ("train", "valid", "test")))


def miniboone(folder: Path) -> Data:
    """The validation rows of MINIBOONE as training rows: a check of the loader, not a row of the paper's table."""
    file = np.load(folder / "miniboone_val_test_f32.npz")
    return Data((file["val"], file["val"], file["test"]))


def casp(folder: Path) -> Data:
    """Protein structures, split 80/10/10 at random, in units of the training rows' standard deviations."""
    x = np.load(folder / "casp_f32.npz")["x"].astype(np.float64)
    x = x[np.random.default_rng(0).permutation(len(x))]
    parts = np.split(x, [int(0.8 * len(x)), int(0.9 * len(x))])
    mean, scale = parts[0].mean(axis=0), parts[0].std(axis=0)
    return Data(tuple(((part - mean) / scale).astype(np.float32) for part in parts))


def load(name: str, folder: Path) -> Data:
    """The data set of that name; FileNotFoundError where its file is absent."""
    if name in BINARY:
        return binary(folder, name)
    if name == "mnist-class":
        return mnist(folder, labelled=True)
    return {"mnist": mnist, "bsds": bsds, "miniboone": miniboone, "casp": casp}[name](folder)
