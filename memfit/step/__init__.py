"""What is trained: the step's description, its batches, and how it runs."""
