"""What `tile-2` gives at 1/2, 1/4 and 1/8: the linear basis at that scale, beside decoding at full size, filtering and averaging.

    python benchmarks/scales.py

PSNR in dB against block means of the source, Kodak and 8 frames of DAC-SDC's test half at 27 and 33 dB. Writes benchmarks/results/scales-cpu.json.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from common import dac_frames, kodak, picture, write_result

from rinr_loader.encode import encode_unit
from rinr_loader.presets import Settings
from rinr_loader.reader import buffer_of
from rinr_loader.surfaces import block_means
from rinr_loader.tiles import open_tiles

TARGETS, SCALES = (27.0, 33.0), (2, 4, 8)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, samples in (("Kodak", kodak()), ("DAC-SDC", dac_frames("test", 8))):
        pictures = [picture(sample) for sample in samples]
        for target in TARGETS:
            buffer = buffer_of(encode_unit(pictures, Settings(family="tile", mode="be", target_psnr=target), unit="scales"))
            for k in SCALES:
                found = []
                for i, one in enumerate(pictures):
                    wanted = block_means(torch.from_numpy(one.pixels).permute(2, 0, 1), k) / 255
                    linear, whole = open_tiles(buffer, [i])([i, i], [k, 1], [(0, 0, *one.pixels.shape[1::-1])] * 2)
                    averaged = block_means(whole, k)
                    found.append([-10 * math.log10(float((image.clamp(0, 1) - wanted).square().mean())) for image in (linear, averaged)])
                linear_psnr, averaged_psnr = np.mean(found, 0).tolist()
                rows.append({"pictures": name, "target": target, "k": k, "linear": round(linear_psnr, 2), "averaged": round(averaged_psnr, 2)})
                print(rows[-1], flush=True)
    write_result("scales", {"rows": rows})


if __name__ == "__main__":
    main()
