"""What a GGUF file says besides its numbers: the model's config, its tensors' names, its tokenizer."""
