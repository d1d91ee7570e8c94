"""The settings of a data set, as all modules that receive no config take them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Which data set is read, and how its images are processed.

    Attributes:
      dataset: digits, array, or a name in `readers.published.PUBLISHED`.
      shape: the height, width and channels of an image of the data.
      padded_shape: the same of the network's input.
      num_levels: the number of values that a pixel can have; 0: floats, or not known yet.
      path: the location of the files; empty: they are downloaded, if that is possible.
      tfds_dir: a folder of TFDS.
      category: the scene of LSUN.
      labelled: whether the network is told labels.
      scale: for floats, the values that become 0 and 1: numbers, or one for each channel.
      channels_first: for arrays, 1: their examples are (C, H, W); 0: (H, W, C); -1: not known.
      centered: whether the model's range is [-1, 1] instead of [0, 1].
      random_flip: whether images are mirrored at random in training.
      dequantization: none, uniform or lossless.
      show_channels: the channels that pictures show; (): all.
      cache: whether decoded images are kept in the user's cache folder.
      max_pixels: images with more are refused.
      skip_unreadable: whether files that are not readable images are left out.
    """

    dataset: str
    shape: tuple[int, int, int]
    padded_shape: tuple[int, int, int]
    num_levels: int
    path: str = ""
    tfds_dir: str = ""
    category: str = ""
    labelled: bool = False
    scale: tuple[Any, ...] = ()
    channels_first: int = -1
    centered: bool = True
    random_flip: bool = True
    dequantization: str = "uniform"
    show_channels: tuple[int, ...] = ()
    cache: bool = True
    max_pixels: int = 2**26
    skip_unreadable: bool = False

    @property
    def is_array(self) -> bool:
        """Whether the data are arrays in units of their own."""
        return self.dataset == "array"
