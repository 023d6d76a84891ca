"""Tests of the rehearsal: children that rehearse a card."""
