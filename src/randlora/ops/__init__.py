"""The method itself: tensors in, tensors out. No file here imports peft or transformers."""
