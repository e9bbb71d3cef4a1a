"""CuTe device vocabulary: what kernels of more than one shape say to the machine."""
