"""scikit-learn's digits with a network that is told their labels, for samples of a digit.

    python main.py --config configs/vp/digits_labels_st.py --mode train
    python main.py --config configs/vp/digits_labels_st.py --mode sample --config.sampling.labels=3

`sampling.guidance` makes samples more typical of their label, and less various.
"""

from ml_collections import ConfigDict

from configs.vp import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.model.num_classes = 10
    return config
