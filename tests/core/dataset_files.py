"""Tiny data sets on disk in the layout of the real ones: the function named as the data set makes its files.

``make(root, seed)`` writes the same file names for every seed, with other content. A data set without a function here
is one that needs no files.
"""

import json
import pickle
import struct

import numpy as np
from PIL import Image
from pycocotools import mask as rle

PER_SPLIT = 6
WNIDS = ("n03404251", "n01443537", "n02504458")
STL_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def pixels_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, seed, size=(7, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(seed, *size, 3)).save(path)


def _pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def cifar10(root, seed=0):
    folder = root / "cifar-10-batches-py"
    for n, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        _pickle(folder / name, {"data": pixels_of((seed, n), 2, 3072), "labels": [n, 9 - n]})
    _pickle(folder / "batches.meta", {"label_names": [f"class {k}" for k in range(10)]})


def cifar100(root, seed=0):
    folder = root / "cifar-100-python"
    for n, name in enumerate(["train", "test"]):
        data, fine = pixels_of((seed, n), PER_SPLIT, 3072), [n, 99, 3, 4, 5, 50]
        _pickle(folder / name, {"data": data, "fine_labels": fine, "coarse_labels": [0] * PER_SPLIT})
    _pickle(folder / "meta", {"fine_label_names": [f"class {k}" for k in range(100)]})


def fashion_mnist(root, seed=0):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(["train", "t10k"]):
        head = struct.pack(">iiii", 0x803, PER_SPLIT, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + pixels_of((seed, n), PER_SPLIT, 28, 28).tobytes())
        labels = struct.pack(">ii", 0x801, PER_SPLIT) + bytes([9, 0, 4, 4, n, 1])
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def stl10(root, seed=0):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, count) in enumerate({"train": 4, "test": 3, "unlabeled": 5}.items()):
        (folder / f"{name}_X.bin").write_bytes(pixels_of((seed, n), count, 3, 96, 96).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes([10, 1, 3, 7][:count]))
    (folder / "class_names.txt").write_text("\n".join(STL_CLASSES) + "\n")


def tiny_imagenet(root, seed=0):
    root.mkdir(parents=True, exist_ok=True)
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "words.txt").write_text("n03404251\tfur coat\nn01443537\tgoldfish, Carassius auratus\nn00000001\tnothing\n")
    for wnid in WNIDS:
        rows = [f"{wnid}_{k}.JPEG\t{k}\t2\t57\t63\n" for k in range(2)]
        for k in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", (seed, k), (64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(rows))
    for k in range(4):
        save(root / "val" / "images" / f"val_{k}.JPEG", (seed, 9, k), (64, 64))
    annotations = [f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t{k}\t63\t{k}\n" for k in (3, 1, 0, 2)]
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))


def imagenet(root, seed=0):
    for split in ("train", "val"):
        for n, wnid in enumerate(WNIDS):
            for k in range(2):
                save(root / split / wnid / f"{wnid}_{k}.JPEG", (seed, n, k))


def imagefolder(root, seed=0):
    for n, path in enumerate(["train/b/0.png", "train/a/1.png", "train/a/deep/2.PNG", "test/a/3.jpg", "test/b/4.png"]):
        save(root / path, (seed, n), (5, 6))
    (root / "train/a/notes.txt").write_text("no image")


def coco(root, seed=0):
    """Boxes of whole pixels with the polygons, counts or compressed counts of the same rectangles."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]
    for n, split in enumerate(["train", "val"]):
        images, annotations = [], []
        for k in range(4):
            save(root / f"{split}2017" / f"{k:012}.jpg", (seed, n, k), (20, 30))
            images.append({"id": 40 - k, "file_name": f"{k:012}.jpg", "height": 20, "width": 30})
        for k, box in enumerate([(2, 3, 10, 8), (0, 0, 30, 20), (12, 5, 4, 15)]):
            entry = {"id": k, "image_id": 40 - k % 2, "category_id": (3, 18)[k % 2], "bbox": list(map(float, box))}
            annotations.append({**entry, "iscrowd": 0, "segmentation": _segmentation(box, k)})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def _segmentation(box, kind):
    left, top, width, height = box
    mask = np.zeros((20, 30), dtype=np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    if kind == 0:
        right, bottom = left + width, top + height
        return [[left, top, right, top, right, bottom, left, bottom]]
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [20, 30], "counts": counts if kind == 1 else rle.encode(mask)["counts"].decode()}


def labelmaps(root, seed=0):
    for n, split in enumerate(["training", "validation"]):
        for k in range(3):
            save(root / "images" / split / f"{k}.jpg", (seed, n, k), (12, 16))
            path = root / "annotations" / split / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_of((seed, n, k), 12, 16) % 4).save(path)
    (root / "classes.txt").write_text("wall\nsky\ntree\n")
