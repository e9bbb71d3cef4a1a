"""Triton back ends, importable only as `cutemoe.triton_kernels`."""

if __name__ != "cutemoe.triton_kernels":
    raise ImportError(
        "this folder is cutemoe.triton_kernels; as a top-level module it would hide the "
        "triton_kernels package that other libraries look for"
    )
