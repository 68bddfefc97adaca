"""Pictures and files that several modules look at."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of its own for every number: blocks of random colours."""
    random = np.random.RandomState(number)
    blocks = random.randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def folder_of_pictures(folder: Path, count: int, languages: tuple[str, ...] = ("en", "de")) -> Path:
    """A folder of pictures with captions in these languages; returns its metadata.jsonl."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        captions = {code: f"{code} picture of number {number} times {number * number}" for code in languages}
        lines.append({"image": f"{number}.png", "caption": captions})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metadata.jsonl"


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def write_shard(path: Path, first: int, count: int) -> Path:
    """A .tar of pictures and captions as img2dataset writes it."""
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            add_member(archive, f"{number:09d}.jpg", encoded(picture(number), "JPEG"))
            add_member(archive, f"{number:09d}.txt", f"a picture with the number {number}".encode())
            add_member(archive, f"{number:09d}.json", json.dumps({"status": "success"}).encode())
    return path
