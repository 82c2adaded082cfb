"""Descriptions of adapters and of their costs, from their files or from a model's shape."""

from randlora.analysis.finite import first_not_finite
from randlora.analysis.update import delta_weight, effective_rank, numerical_rank, singular_values

__all__ = ["delta_weight", "effective_rank", "first_not_finite", "numerical_rank", "singular_values"]
