# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels of ``_C_cuda.so`` (csrc/*/*.cu)."""
