"""Metrics on plain lists: per-row values first, intervals from the rows, reports last. See ``measure.measure``.

What can't be scored is ``None`` and is counted; it is never a silent 0 or 1.
"""
