"""Hugging Face PEFT: the layers of its tuners, a file for each method."""
