"""The fields of tissue that the demo's slide is put together of: `xmag/demo/fields.avif`.

    python benchmarks/demo_fields.py IMAGES [--out xmag/demo/fields.avif]

IMAGES are the 1024 px JPEGs of TCIA Osteosarcoma-Tumor-Assessment (Leavey et al. 2019, doi
10.7937/tcia.2019.bvhjhdas, CC BY 3.0). A row of 8 fields for each class, neighbours alike, stored
as AVIF. Nothing but the compression changes them.
"""

import argparse
from pathlib import Path

from PIL import Image

QUALITY = 43
"""The best with which the file stays below 2 MB."""
FIELDS = {
    "Viable": (
        "Case-48-P5-C20-33672-6381_119", "Case-48-P5-C23-54011-19464_110",
        "Case-48-P5-C20-15162-19423_103", "Case-4-C21-25306-21689_120",
        "Case-4-C28-27016-13463_105", "Case-4-C29-29639-16570_104",
        "Case-4-C28-30914-19280_102", "Case-4-C27-32431-19828_114",
    ),
    "Non-Viable-Tumor": (
        "Case-3-A12-19907-12559_113", "Case-3-A17-18676-13247_116",
        "Case-3-A8-42275-18820_109", "Case-3-A8-27422-14386_120",
        "Case-4-C24-16355-22492_115", "Case-4-C31-10015-17952_106",
        "Case-4-C31-22851-36922_119", "Case-3-A15-34291-15707_101",
    ),
    "Non-Tumor": (
        "Case-4-C22-29696-31650_120", "Case-4-C22-42649-20389_117", "P9-B28-8403-19923_107",
        "P9-B28-26096-29717_110", "P9-B7-22066-28200_115", "P9-B12-30770-23009_108",
        "P9-B12-15791-34183_103", "Case-3-A18-41302-32324_101",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("xmag/demo/fields.avif"))
    args = parser.parse_args()
    atlas = Image.new("RGB", (8 * 1024, len(FIELDS) * 1024))
    for row, (kind, names) in enumerate(FIELDS.items()):
        for column, name in enumerate(names):
            with Image.open(args.images / f"{kind}___{name}.jpg") as field:
                atlas.paste(field, (column * 1024, row * 1024))
    atlas.save(args.out, format="AVIF", quality=QUALITY, speed=8)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
