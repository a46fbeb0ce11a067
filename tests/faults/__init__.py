"""Training and conversion under faults. `make faults` runs everything; the test suite runs a part of each."""
