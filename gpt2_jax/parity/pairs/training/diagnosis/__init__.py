"""The kind of the first difference of two trainers, from evidence only."""
