"""The probe sequences are the same in every process and version: their log-probs are stored beside policies.

python -m pytest tests/unit/models/test_probes.py
"""

from __future__ import annotations

import numpy as np
import pytest

from mipo_ray.models.probes import PROBES, PROMPT_TOKENS, RESPONSE_TOKENS, probes

FIRST = [16991, 38689, 10424, 12317]
LAST = [39996, 27007, 37211, 37678]


@pytest.mark.parametrize("vocabulary", [400, 49_152, 151_936])
def test_they_are_ids_of_the_vocabulary(vocabulary: int) -> None:
    found = probes(vocabulary)
    assert len(found) == PROBES
    for probe in found:
        assert probe.prompt.shape == (PROMPT_TOKENS,)
        assert probe.response.shape == (RESPONSE_TOKENS,)
        assert probe.prompt.dtype == probe.response.dtype == np.int64
        assert 0 <= probe.prompt.min() <= probe.prompt.max() < vocabulary
    ids = np.concatenate([[*probe.prompt, *probe.response] for probe in found])
    assert len(np.unique(ids)) > 100


def test_stored_log_probs_stay_those_of_the_same_sequences() -> None:
    first = probes(49_152)[0]
    assert first.prompt[:4].tolist() == FIRST
    assert probes(49_152)[-1].response[-4:].tolist() == LAST
