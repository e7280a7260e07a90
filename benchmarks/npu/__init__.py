"""What the NPU makes of a graph: trials on the simulator, its twins, and what its artifact loses."""
