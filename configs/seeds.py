"""Offsets that are added to a run's seed, one for each use of random numbers except training.

Training and the initial parameters use the seed itself.
"""

TEST_LOSS = 1
SAMPLES = 2
GRIDS = 3  # the samples that training shows
BITS_PER_DIM = 4
COMPLETIONS = 5  # inpainting and colourisation
LARGEST = 5
