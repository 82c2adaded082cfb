"""An adapter on disk: its names, the tensors that it may hold, saving, loading and swapping."""
