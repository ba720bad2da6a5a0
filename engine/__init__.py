"""What the scripts share, a file for each subject."""

import gc

import torch  # noqa: F401

# Each full sweep of the garbage collector walks the 170,000 objects that torch's import leaves and frees next to none of them: they stay as
# long as the process. Frozen they are passed over: in the imports that follow, while a model trains, and when Python ends.
gc.freeze()
