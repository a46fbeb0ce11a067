"""Terminal output, report files, and process settings, shared by the commands and benchmarks."""
