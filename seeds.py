"""What is added to a run's seed for the random numbers of each use beside training.

Training and the first parameters use the seed itself.
"""

TEST_LOSS = 1
SAMPLES = 2
GRIDS = 3  # the samples that training shows
BITS_PER_DIM = 4
COMPLETIONS = 5  # inpainting and colourisation
LARGEST = 5
