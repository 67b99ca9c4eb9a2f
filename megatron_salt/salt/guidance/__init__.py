"""Hidden-state guidance (LET, arXiv 2602.05393): an early layer of the student is aligned with the teacher's last hidden states."""
