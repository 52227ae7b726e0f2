"""Examines a model on this machine: does it load, decode rightly, how fast, does it look, what does it reach."""
