"""A published adapter as a LoRA that others load, and such files read back."""
