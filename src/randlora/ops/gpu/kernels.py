"""All kernels as functions of tensors. Importing this file needs Triton.

Each takes a step that torch's own operations take too, where it is called (``availability.kernels``): that is its twin.
"""

from randlora.ops.gpu.elementwise import mixed, scaled, stochastic_sum
from randlora.ops.gpu.gradients import scaling_gradients
from randlora.ops.gpu.products import rounded_sum

__all__ = ["mixed", "rounded_sum", "scaled", "scaling_gradients", "stochastic_sum"]
