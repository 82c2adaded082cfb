"""The kernels for GPUs, their twins in plain torch, and the operands that use them."""
