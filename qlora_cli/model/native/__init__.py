"""The parts of a training step that are written in C++, for CPUs, compiled on the machine that runs them."""
