"""Peak FLOP/s of GPUs."""

# Of dense bfloat16 and float16 products, in TFLOP/s, as NVIDIA's data sheets have them; the first name that fits.
# (Lightning's own table takes an L40S for an L4, and does not find an H200.)
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "NVIDIA L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """A GPU's peak FLOP/s; None if unknown, or if the products are not in 16 bits."""
    if not precision.startswith(("bf16", "16")):
        return None
    return next((1e12 * peak for name, peak in PEAKS.items() if name in device_name), None)
