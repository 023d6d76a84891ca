"""Workspaces of convolutions, as the installed cuDNN says them for a card that is not there."""
