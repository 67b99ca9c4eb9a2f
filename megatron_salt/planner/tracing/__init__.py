"""What the child process does: the real model on tensors without memory."""
