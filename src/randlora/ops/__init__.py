"""The method itself: tensors in, tensors out. Nothing here knows peft or transformers."""
