"""What the scripts share, a file for each subject."""

import gc

import torch  # noqa: F401

# A full sweep of the garbage collector walks every object that torch's import left, some 0.15 s each time, and finds nothing: they stay
# as long as the process. Frozen, they are passed over, here at the start and while a model trains.
gc.freeze()
