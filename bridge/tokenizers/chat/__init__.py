"""Chat templates: reading them, rendering them in a process of its own, and encoding the result."""
