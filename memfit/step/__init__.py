"""Training steps: their description, their batches, and how they run."""
