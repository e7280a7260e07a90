"""SoCs, their limits, vendors' compilers, and runtimes that execute artifacts."""
