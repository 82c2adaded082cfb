"""All kernels as functions of tensors. Importing this file needs Triton.

Beside each call of a kernel (``availability.kernels``), torch's own operations compute the same step.
"""

from randlora.ops.gpu.elementwise import mixed, scaled, stochastic_sum
from randlora.ops.gpu.gradients import scaling_gradients
from randlora.ops.gpu.products import rounded_sum

__all__ = ["mixed", "rounded_sum", "scaled", "scaling_gradients", "stochastic_sum"]
