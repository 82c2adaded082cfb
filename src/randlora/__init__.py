"""RandLoRA for Hugging Face PEFT."""
