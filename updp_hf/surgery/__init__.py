"""The verbs on a model: find, gate, calibrate, merge."""
