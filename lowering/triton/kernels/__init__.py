"""The Triton kernels, a family a file. Importing one imports Triton."""
