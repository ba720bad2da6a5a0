"""Tests ask no hub: a name that is none of a folder fails at once there, and not after a minute of tries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
