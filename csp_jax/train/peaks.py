"""What devices can do at best: dense bfloat16 products a second, from the vendors' data sheets. Loads no jax."""

from __future__ import annotations

import re

A100, H100 = 312e12, 989e12  # H100, H200: SXM modules
V4, V5E, V5P, V6E = 275e12, 197e12, 459e12, 918e12
# By the name that the driver gives a device.
NAMES = (
    (r"NVIDIA A100\b.*", A100),
    (r"NVIDIA (H100 80GB HBM3|H200|GH200\b.*)", H100),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 NVL", 835e12),
    (r"TPU v4", V4),
    (r"TPU v5 ?(lite|e)", V5E),
    (r"TPU v5p?", V5P),
    (r"TPU v6 ?(lite|e)", V6E),
)


def peak_flops(device_kind: str) -> float | None:
    """Of a device by JAX's `device_kind`; None where it is not known."""
    return next((peak for name, peak in NAMES if re.fullmatch(name, device_kind)), None)
