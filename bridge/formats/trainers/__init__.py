"""Formats of trainers: nanoGPT, llm.c and this project."""
