"""What the verbs and benchmarks share: terminal output, report files, and process set-up."""
