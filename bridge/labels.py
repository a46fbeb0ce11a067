"""What both backends' losses agree on."""

IGNORE_INDEX = -100
"""A label that counts nowhere: padding, or a prompt that is not to be learned. PyTorch's own default."""
