"""The errors that randlora raises on purpose. Each message names the faulty value and a remedy."""


class RandLoraError(Exception):
    """The base class of all errors that randlora raises on purpose."""


class ConfigError(RandLoraError, ValueError):
    """A configuration value, or a combination of values, that cannot mean anything."""


class BasisMismatchError(RandLoraError, ValueError):
    """Bases that differ from those of the adapter's training."""


class CheckpointError(RandLoraError, ValueError):
    """An adapter file that is damaged, incomplete, or has tensors that do not belong in it."""


class UnsupportedLayerError(RandLoraError, ValueError):
    """A targeted module of a kind that RandLoRA cannot adapt."""


class MergeError(RandLoraError, ValueError):
    """A merge that would break the weights of the base layer."""


class AdapterNamesError(RandLoraError, ValueError):
    """A batch whose ``adapter_names`` cannot be followed."""


class CombinationError(RandLoraError, ValueError):
    """An impossible combination of adapters."""


class HotswapError(RandLoraError, ValueError):
    """An adapter that cannot take the place of another."""


class UnknownModelError(RandLoraError, LookupError):
    """A request for a model that a server does not have."""
