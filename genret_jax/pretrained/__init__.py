"""Pretrained T5s: Hugging Face folders in and out, and where they are found."""
