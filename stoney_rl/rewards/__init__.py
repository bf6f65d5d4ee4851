"""Rewards that mean something: terms, the composite made of them, the attacks that it must survive (README.md)."""
