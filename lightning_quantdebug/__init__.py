"""Find out whether a Lightning model survives quantization, what breaks it, and where."""

__version__ = "0.1.0"
