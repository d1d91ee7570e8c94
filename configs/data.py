"""The settings of a config's data set."""

from ml_collections import ConfigDict

from configs.shapes import array_shape, image_shape
from data.spec import DataSpec


def data_spec(config: ConfigDict) -> DataSpec:
    """The settings of the data set that `config.data` names."""
    data = config.data
    levels = {"array": data.num_levels, "digits": 17}
    return DataSpec(
        dataset=data.dataset,
        shape=array_shape(config),
        padded_shape=image_shape(config),
        num_levels=levels.get(data.dataset, 256),
        path=data.path,
        tfds_dir=data.tfds_dir,
        category=data.category,
        labelled=config.model.num_classes != 0,
        scale=tuple(data.scale),
        channels_first=data.channels_first,
        centered=data.centered,
        random_flip=data.random_flip,
        dequantization=data.dequantization,
        show_channels=tuple(config.sampling.show_channels),
        cache=data.cache,
        max_pixels=data.max_pixels,
        skip_unreadable=data.skip_unreadable,
    )
