"""The errors that randlora raises on purpose. Each message names the value and the way out."""


class RandLoraError(Exception):
    """Base class of every error that randlora raises on purpose."""


class ConfigError(RandLoraError, ValueError):
    """A configuration value, or a combination of values, that cannot mean anything."""


class BasisMismatchError(RandLoraError, ValueError):
    """The bases at hand are not the ones that the adapter was trained with."""


class CheckpointError(RandLoraError, ValueError):
    """An adapter file that lacks what it must have or has what it must not."""


class UnsupportedLayerError(RandLoraError, ValueError):
    """A targeted module of a kind that RandLoRA cannot adapt."""


class MergeError(RandLoraError, ValueError):
    """A merge that would break the weights of the base layer."""


class AdapterNamesError(RandLoraError, ValueError):
    """A batch whose ``adapter_names`` cannot be followed."""


class CombinationError(RandLoraError, ValueError):
    """A combination of adapters that is none of the kind that was asked for."""


class HotswapError(RandLoraError, ValueError):
    """An adapter that cannot take the place of another."""


class UnknownModelError(RandLoraError, LookupError):
    """A request for a model that a server does not have."""
