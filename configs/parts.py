"""The parts of a config that are plain values; configs/default.py explains each field.

`build` makes them from a config. The modules below `build` receive these parts, and no config.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Loop:
    """The length of a training, and how often it logs, scores and saves (`config.training`)."""

    batch_size: int
    n_iters: int
    n_jitted_steps: int
    log_freq: int
    eval_freq: int
    snapshot_freq: int
    snapshot_freq_for_preemption: int
    snapshot_sampling: bool
    max_skipped_steps: int
    max_failed_saves: int

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        regular = (self.snapshot_freq, self.snapshot_freq_for_preemption)
        return step == self.n_iters or any(step % freq == 0 for freq in regular)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many samples are drawn, for which labels, and in which format (`config.sampling`)."""

    method: str
    task: str
    mask: str
    batch_size: int
    n_images: int
    format: str
    labels: str
    guidance: float
    keep: int
    show_channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is scored, and how (`config.eval`)."""

    begin_ckpt: int
    end_ckpt: int
    samples: str
    batch_size: int
    sampling_batch_size: int
    enable_sampling: bool
    enable_bpd: bool
    enable_fid: bool
    num_samples: int
    num_reference: int
    inception_path: str
    stats_path: str
    num_test_data: int
    num_draws: int
    image_draws: int
    nelbo_draws: int
    truncated_normal: bool
    images: str
    nll_steps: int
    rtol: float
    atol: float
    cache_dir: str

    @property
    def samples_a_batch(self) -> int:
        """The number of samples that are drawn at once, on all devices."""
        return min(self.sampling_batch_size or self.batch_size, self.num_samples)
