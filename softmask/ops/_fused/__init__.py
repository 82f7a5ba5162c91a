"""The kernels as PyTorch ops: shapes for torch.compile and gradients. One file per op."""
