"""The claim on 16×16 crops of photographs, for a CPU; make_data.py makes the crops."""

from configs.vp import folder_st
from experiments.claim import get_claim
from experiments.sweep import Sweep

_BEST: dict[str, tuple[str, ...]] = {
    "noise": ("fixed_1e-5",),
    "velocity": ("fixed_1e-4", "fixed_1e-5"),
}


def get_sweep() -> Sweep:
    """The sweep."""
    config = folder_st.get_config()
    config.data.image_size = 16
    config.model.update(
        nf=16,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(8,),
        dropout=0.0,
        ema_rate=0.995,
    )
    return get_claim("claim_photographs", config, _BEST, num_images=256)
