"""The kinds of layers that can be adapted."""
