"""Images with one label each, in memory, as sequences of pixels: the source of pipelines."""

import numpy as np

from experiments.data.sequences import Sequences


class Pixels:
    """Images of equal size as sequences of pixels, row by row, without padding.

    Attributes:
      stored: the bytes of the images, channel after channel of every pixel.
      channels: number of values of a pixel.
      scaling: mean and standard deviation of the values in [0, 1], subtracted and divided by; None gives tokens.
      lengths: number of positions of each image.
    """

    def __init__(self, stored: Sequences, *, channels: int = 1, scaling: tuple[float, float] | None = None):
        """Creates the source.

        Raises:
          ValueError: if the images differ in size, or tokens are asked for of more than one channel.
        """
        size = int(stored.lengths[0])
        if np.any(stored.lengths != size) or size % channels:
            raise ValueError(
                f"images must have one size, a multiple of {channels} values; got {np.unique(stored.lengths)}"
            )
        if scaling is None and channels != 1:
            raise ValueError(f"tokens need images of one channel, got {channels}")
        self.stored, self.channels, self.scaling = stored, channels, scaling
        self.lengths = stored.lengths // channels
        self._images = stored.tokens.reshape(len(stored), size // channels, channels)

    def __len__(self) -> int:
        return len(self.stored)

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the images at `indices`: inputs (tokens int32 (b, t) or float32 (b, t, c)) and labels (b,) int32.

        Raises:
          ValueError: if `width` is not the number of pixels.
        """
        images = self._images[indices]
        if width != images.shape[1]:
            raise ValueError(
                f"images of {images.shape[1]} pixels are not padded, so a width of {width} is impossible"
            )
        labels = self.stored.labels[indices]
        if self.scaling is None:
            return {"inputs": images[..., 0].astype(np.int32), "labels": labels}
        mean, deviation = self.scaling
        inputs = (images.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(deviation)
        return {"inputs": inputs, "labels": labels}
