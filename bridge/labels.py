"""What both backends' losses agree on."""

IGNORED = -100
"""A label that counts nowhere: padding, or a prompt that is not to be learned. PyTorch's own default."""
