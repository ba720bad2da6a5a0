"""Sounds for tests."""

from pathlib import Path

import numpy as np
import pytest


def write_noise(path: Path, generator: np.random.Generator, size: int, third: int) -> None:
    """`size` samples at 16 kHz of a noise whose power lies in one third of the spectrum: 0, 1 or 2."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    power = np.fft.rfft(generator.normal(size=size))
    there = np.arange(len(power)) * 3 // len(power) == third
    soundfile.write(path, 0.3 * np.fft.irfft(power * (there + 0.1)), 16000)
