"""What ``inspect_hf_dataset.py`` looks for in a dataset: one module a question, each giving a ``Section``."""
