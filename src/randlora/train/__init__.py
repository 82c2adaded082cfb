"""Fine-tuning on the user's own model and data, by transformers' Trainer."""
