"""`qlora`: fine-tunes 4-bit language models from YAML recipes."""

__version__ = "0.1.0"
