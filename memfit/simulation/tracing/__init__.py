"""A training step traced on meta tensors, as the events that its memory makes."""
