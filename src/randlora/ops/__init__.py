"""The method itself: tensors in, tensors out. Knows nothing of peft or transformers."""
