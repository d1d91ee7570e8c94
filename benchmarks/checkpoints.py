"""How long training waits for saving a checkpoint, and how long resuming takes.

python -m benchmarks.checkpoints

Prints, for the full-width CIFAR-10 recipe, the size of a checkpoint, how long training waits for a
save, how long writing takes in all, how long reading takes, the share of the checksums in both, and
the share of training time that waiting takes at the recipe's interval and a given training speed.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
from clu.parameter_overview import count_parameters

import build
from benchmarks.measure import get_parser
from configs.vp import cifar10_st
from runtime import checkpointing
from runtime.checksums import checksums


def main() -> None:
    """Measure saving and reading, and print the results."""
    parser = get_parser(__doc__)
    parser.add_argument("--steps_per_second", type=float, default=28.0, help="speed of training")
    rate = parser.parse_args().steps_per_second
    config = cifar10_st.get_config()
    setup = build.set_up(config)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(s.dtype), setup.state_shape)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{count_parameters(state.params):,} parameters, {size / 2**20:.0f} MiB of state")
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        with checkpointing.checkpoints(workdir, config.training.snapshot_freq) as manager:
            saver = checkpointing.Saver(manager, max_failures=1)
            for step in (1, 2):
                start, worked = time.time(), time.process_time()
                saver.save(step, state)
                blocked = time.time() - start
                saver.settle()
                total, save = time.time() - start, time.process_time() - worked
                print(f"save {step}: training waits {blocked:.2f} s, written in {total:.2f} s")
        start, worked = time.time(), time.process_time()
        restored = checkpointing.restore(workdir / "checkpoints", setup.state_shape, 2)
        print(f"read in {time.time() - start:.2f} s")
        read, worked = time.process_time() - worked, time.process_time()
        checksums(state)
        sums = time.process_time() - worked
        print(
            f"CPU time: save {save:.2f} s, read {read:.2f} s; of each {sums:.2f} s are checksums, "
            f"{sums / save:.1%} and {sums / read:.1%}"
        )
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    every = config.training.snapshot_freq_for_preemption
    share = blocked / (every / rate)
    print(f"at {rate:g} steps/s and a save every {every} steps, {share:.2%} of the time is waiting")


if __name__ == "__main__":
    main()
