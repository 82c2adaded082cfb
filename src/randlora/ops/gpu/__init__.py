"""The kernels for GPUs: the small steps of an adapted layer, and sums of two products."""
