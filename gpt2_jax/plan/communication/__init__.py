"""Communication of a compiled program, read from its HLO text."""
