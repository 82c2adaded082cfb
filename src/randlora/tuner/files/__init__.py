"""An adapter on disk: its names, what it may hold, saving, loading and swapping."""
