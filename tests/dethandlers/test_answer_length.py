"""An answer that is longer than the frontend passes on is refused before it costs the worker."""

import pytest
from dethandlers.responses import too_long


@pytest.mark.parametrize("text", ["x" * 1000, "é" * 500, "\U0001f600" * 250])
def test_the_limit_is_of_bytes(text):
    assert len(text.encode()) == 1000
    assert too_long(text, 7, 1000) is None
    refusal = too_long(text + "x", 7, 1000)
    assert (refusal.code, refusal.type) == (413, "answer_too_long")
    assert "got an answer of 1,001 bytes for 7 detections, expected at most 1,000" in refusal.message
    assert "max_detections" in refusal.message
