"""The report of `gpt2 verify`: its content, plots and HTML page."""
