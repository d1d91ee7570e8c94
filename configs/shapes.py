"""The shapes of images that a config asks for."""

from ml_collections import ConfigDict

from configs import fields
from models.networks import NETWORKS


def size_factor(config: ConfigDict) -> int:
    """The number by which the network divides the height and width of images."""
    return fields.call(NETWORKS[config.model.name].size_factor, config, "model", "data")


def array_shape(config: ConfigDict) -> tuple[int, int, int]:
    """The height, width and channels of an image of the data."""
    data = config.data
    return data.image_size, data.image_width or data.image_size, data.num_channels


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """The height, width and channels of an image as the network gets it, padded if `data.pad`."""
    height, width, channels = array_shape(config)
    if config.data.pad:
        factor = size_factor(config)
        height, width = (-(-size // factor) * factor for size in (height, width))
    return height, width, channels
