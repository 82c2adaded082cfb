"""What holds for every test: no hub, fixed seeds, one thread per worker, and fresh memory that is NaN."""

import os

# Read when huggingface_hub is imported, so set before anything can import it.
os.environ["HF_HUB_OFFLINE"] = "1"

import random

import hypothesis
import numpy as np
import pytest
import torch

from fixtures import reviews, sentences, tiny_bert, tiny_llama, tokenizer  # noqa: F401 - fixtures for all tests

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("slow", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores, so threads of theirs would fight

# Uninitialised memory often happens to be zero, which hides a value that nobody wrote. In deterministic mode
# torch writes NaN into it (the largest value, for integers), in C++ as well as from Python. We want only
# that: warn_only, because operations without a deterministic form are none of a test's business.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
