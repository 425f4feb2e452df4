"""Accelerated classes of Hugging Face transformers, one file a model. The layer norms are torch.nn's."""
