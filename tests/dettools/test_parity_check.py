"""Differences of masks that only the pasting makes: borne where the box lies between two pixels, and nowhere else."""

import numpy as np
import pytest
from dethandlers.detections import Detections
from dettools.agreement import Finding
from dettools.verification.parity_check import _by_rounding


def one(box):
    return Detections(np.array([box], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))


# Centre 14 and half 14 grow to 14 ± 15: the left corner is at -1.0 and cut to -1 or, just right of it, to 0.
@pytest.mark.parametrize(
    ("eager", "found", "borne"),
    [
        ([0.0, 0.0, 28.0, 28.0], [0.001, 0.0, 28.0, 28.0], True),
        ([0.5, 0.5, 28.3, 28.3], [0.501, 0.5, 28.3, 28.3], False),
        ([0.0, 0.0, 28.0, 28.0], [0.0, 0.0, 28.0, 28.0], False),
    ],
    ids=["between two pixels", "inside one", "the same box"],
)
def test_only_a_mask_whose_box_is_cut_elsewhere_is_borne(eager, found, borne):
    finding = Finding("mask_drift", "mask IoU 0.81", 0, 0)
    assert _by_rounding(finding, one(eager), one(found)) is borne


def test_other_findings_are_never_borne():
    near, far = one([0.0, 0.0, 28.0, 28.0]), one([0.001, 0.0, 28.0, 28.0])
    assert not _by_rounding(Finding("box_drift", "by 3 px", 0, 0), near, far)
    assert not _by_rounding(Finding("missing", "score 0.9", 0, None), near, far)
