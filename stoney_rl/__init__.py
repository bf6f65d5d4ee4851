"""What two or more stages of the Stoney-RL pipeline share. Importing this package loads no torch."""

__version__ = "0.1.0"
