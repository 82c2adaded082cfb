"""RandLoRA as a PEFT tuner. The only folder that knows PEFT's internals."""
