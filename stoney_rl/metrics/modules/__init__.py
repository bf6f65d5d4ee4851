"""One ``evaluate.Metric`` a file, for ``evaluate.load("stoney_rl/metrics/modules/chrf.py")``: no network, run from the checkout."""
