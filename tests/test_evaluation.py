"""Intervals of what evaluations measure."""

import math

import pytest
import torch

from qcore.evaluation import Evaluation


def test_intervals_have_the_mean_of_most_texts() -> None:
    """Of 200 texts whose windows differ more than their tokens do, 95 of 100 intervals have the mean of all, give or take what 200 leave to chance."""
    windows, each, inside = 40, 32, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(windows, 1, generator=generator) + 0.1 * torch.randn(windows, each, generator=generator)
        losses = 3 + own.flatten()
        low, high = Evaluation(losses, None, None, (each,) * windows).summary()["perplexity_ci95"]
        inside += low <= math.exp(3) <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_windows_of_different_lengths_count_by_their_tokens() -> None:
    losses = torch.cat([torch.full((100,), 1.0), torch.full((1,), 2.0)])
    found = Evaluation(losses, None, None, (100, 1)).summary()
    assert found["perplexity"] == pytest.approx(math.exp(102 / 101))
    assert found["perplexity_ci95"] == pytest.approx([math.exp(1.0), math.exp(2.0)])


def test_a_single_window_has_no_interval() -> None:
    found = Evaluation(torch.ones(5), torch.ones(5), torch.ones(5, dtype=torch.bool), (5,)).summary()
    assert not any(name.endswith("_ci95") for name in found)
