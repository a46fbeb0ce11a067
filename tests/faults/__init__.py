"""Training and conversion under faults: `make faults` runs all of it, the suite a little of each."""
