"""Your own arrays: any .npy, .npz or folder of them as `data.path` (docs/data.md).

Their shape and units are read from them. A DDPM++ of 7.0 M parameters for one GPU, as that of
`folder_st`; arrays are not flipped, and are scored without Inception.
"""

from ml_collections import ConfigDict

from configs.vp import folder_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = folder_st.get_config()
    config.data.update(dataset="array", random_flip=False)
    config.eval.enable_fid = False
    return config
