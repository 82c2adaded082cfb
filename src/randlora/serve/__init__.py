"""The server behind `randlora serve`: adapters of one base model side by side, by name."""
