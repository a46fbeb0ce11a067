"""Which parameter, module or output of one side is which of the other, and how its axes are ordered."""
