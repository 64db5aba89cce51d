"""The hybrid Transformer/Mamba-2 language model: tensors only, no text."""
