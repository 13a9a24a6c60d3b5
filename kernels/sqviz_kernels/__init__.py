"""INT8 kernels: `spec` defines each operation in plain torch, every backend is tested to agree with it."""
