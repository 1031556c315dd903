"""Our kernel for NF4, run by Triton's interpreter, beside torchao; prints how many elements differ.

A program of its own (`test_quantized_tensor.py` runs it), for the reasons that `liger_on_cpu.py` gives.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.beside import folder_of

sys.path += [str(folder_of("triton")), str(folder_of("torchao"))]

from automodel_trainer.models.quantization._torchao import nf4_tensor
from automodel_trainer.models.quantization.nf4_triton import dequantize_in_one_pass


def main() -> None:
    torch.manual_seed(0)
    differ = 0
    for dtype in (torch.float16, torch.float32):  # the interpreter cuts bfloat16 off instead of rounding
        for rows, scale_block in ((37, 1), (64, 16), (512, 256)):
            packed = nf4_tensor().from_tensor((torch.randn(rows, 64) * 0.02).to(dtype), 64, scale_block)
            parts = (packed.quantized_data, packed.quantized_scalers, packed.quantization_factor, packed.scaler_mean)
            ours = dequantize_in_one_pass(*parts, packed.nf4)
            wanted = packed.get_original_weight().reshape(-1)
            assert ours.dtype == wanted.dtype == dtype
            differ += int((ours != wanted).sum())
    print(differ)


if __name__ == "__main__":
    main()
