"""Log-mel spectrograms against the NumPy path of transformers' WhisperFeatureExtractor (1e-5)."""

import numpy as np
from transformers import WhisperFeatureExtractor

from experiments.data.log_mel import log_mel


def test_equals_whisper():
    rng, time = np.random.default_rng(0), np.arange(16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time) + 1e-3 * rng.standard_normal(16_000)
    rising = np.where(time < 0.3, np.sin(2 * np.pi * 3000 * time**2), 0)
    samples = np.stack([rng.uniform(-1, 1, 16_000), tone, rising]).astype(np.float32)
    whisper = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    for x, got in zip(samples, log_mel(samples), strict=True):
        theirs = whisper._np_extract_fbank_features(x[None], "cpu")[0].T
        np.testing.assert_allclose(got, theirs, atol=1e-5)
