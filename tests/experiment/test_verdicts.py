"""Counts and calibration of a classifier's verdicts, against the libraries."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.functional.classification import multiclass_calibration_error

from experiment.pages.predictions import Verdicts


def test_counts_and_calibration_error_equal_those_of_scikit_learn_and_torchmetrics() -> None:
    numbers = np.random.default_rng(0)
    logits, truth = numbers.normal(size=(500, 3)) * 2, numbers.integers(0, 3, 500)
    probabilities = torch.tensor(logits).softmax(1).numpy()
    verdicts = Verdicts(["a", "b", "c"], ["text"] * 500, truth, probabilities, "test")
    assert (verdicts.confusion() == confusion_matrix(truth, verdicts.predicted)).all()
    expected = multiclass_calibration_error(torch.tensor(probabilities), torch.tensor(truth), 3, n_bins=10)
    assert verdicts.calibration_error() == pytest.approx(expected.item(), abs=1e-6)
    assert verdicts.accuracy == np.trace(verdicts.confusion()) / 500
