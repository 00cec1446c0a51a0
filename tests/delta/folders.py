"""Models' folders of random bits, with the tensors in one file or shared out over several."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int64,
)
SHAPES = [(), (0,), (3, 0), (0, 5), (1,), (7,), (5, 3), (33, 2), (2, 3, 4), (64, 1)]


def random_bits(shape, dtype, generator) -> torch.Tensor:
    """Any bits at all: NaN, infinities and both zeros among them."""
    octets = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return octets.reshape(-1).view(dtype).reshape(shape)


def random_model(seed=0) -> dict[str, torch.Tensor]:
    """Every shape in every dtype, and truths."""
    generator = torch.Generator().manual_seed(seed)
    model = {
        f"layers.{i}.{str(dtype).removeprefix('torch.')}": random_bits(shape, dtype, generator)
        for i, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }
    return model | {"größe.bool": torch.randint(0, 2, (40, 2), generator=generator).bool()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def with_changed(model, share=0.3, seed=1):
    """Return the model with a bit flipped in some of the rows of some tensors, and how many rows of each differ."""
    generator = torch.Generator().manual_seed(seed)
    changed, counts = {}, {}
    for name, tensor in model.items():
        rows = tensor.clone().reshape(-1, tensor.shape[-1] if tensor.shape else 1) if tensor.numel() else tensor
        counts[name] = 0
        if tensor.numel() and torch.rand((), generator=generator) < 0.7:
            hit = torch.rand(len(rows), generator=generator) < share
            counts[name] = int(hit.sum())
            octets = rows.view(torch.uint8).reshape(len(rows), -1)
            octets[hit, -1] ^= 1
        changed[name] = rows.reshape(tensor.shape)
    return changed, counts


def write_folder(folder: Path, model, shards=1, more=None) -> Path:
    """Write a model's folder as the hub has it, its tensors dealt out to the shards."""
    folder.mkdir(parents=True)
    for name, text in ({"config.json": "{}", "tokenizer/merges.txt": "a b"} | (more or {})).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    if shards == 1:
        save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    index = {name: names[i % shards] for i, name in enumerate(model)}
    for file in names:
        save_file({name: model[name] for name in model if index[name] == file}, folder / file, {"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def hub_cache(folder: Path, source: Path) -> Path:
    """Lay a model's folder out as the hub's cache does: a snapshot of links to blobs; return the snapshot."""
    snapshot = folder / "snapshots" / "rev"
    (folder / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob, link = folder / "blobs" / f"{number:040x}", snapshot / path.relative_to(source)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
