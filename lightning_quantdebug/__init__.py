"""Find out whether a Lightning model survives quantization, what breaks it, and where."""
