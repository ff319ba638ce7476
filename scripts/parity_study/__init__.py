"""The parts of scripts/parity.py."""
