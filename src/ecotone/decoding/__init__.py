"""The brain of distributed generation: engine and stages as pure machines. No I/O, no clock, no torch."""
